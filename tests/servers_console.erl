%% Read by the node once RabbitMQ has booted: answers Erlang expressions on a loopback port, so that tests administer
%% their server in a millisecond where rabbitmqctl takes a second. The port is in the environment variable CONSOLE_PORT.
Talk = fun Talk(Socket) ->
    case gen_tcp:recv(Socket, 0) of
        {ok, Text} ->
            Answer = try
                {ok, Tokens, _} = erl_scan:string(unicode:characters_to_list(Text)),
                {ok, Expressions} = erl_parse:parse_exprs(Tokens),
                {value, Value, _} = erl_eval:exprs(Expressions, []),
                io_lib:format("+~0tp", [Value])
            catch
                Class:Reason -> io_lib:format("-~0tp", [{Class, Reason}])
            end,
            gen_tcp:send(Socket, unicode:characters_to_binary(Answer)),
            Talk(Socket);
        _ ->
            gen_tcp:close(Socket)
    end
end,
Accept = fun Accept(Listener) ->
    {ok, Socket} = gen_tcp:accept(Listener),
    Served = spawn(fun() -> receive go -> Talk(Socket) end end),
    ok = gen_tcp:controlling_process(Socket, Served),
    Served ! go,
    Accept(Listener)
end,
Port = list_to_integer(os:getenv("CONSOLE_PORT")),
Options = [binary, {packet, 4}, {active, false}, {ip, {127, 0, 0, 1}}, {reuseaddr, true}, {backlog, 64}],
spawn(fun() ->
    {ok, Listener} = gen_tcp:listen(Port, Options),
    Accept(Listener)
end).
