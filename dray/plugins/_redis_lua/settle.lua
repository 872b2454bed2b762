#!lua flags=allow-oom
-- Settles deliveries of any kind: each is swapped for its follow-ups, put aside, or given back.
--   KEYS    the base of the queue; those of the follow-ups' queues (the first one again, if it is one of them)
--   ARGV    how long dead letters are kept, ms; for each delivery, in the order they were handed out: batch, index,
--           action (ack, dead, release), reason, how many runs of follow-ups, the runs as store() takes them
--   answer  the places (batch-index) whose receipts were no longer good: nothing was done for these
look_at_clock()
local base = KEYS[1]

local function skip(at, runs)
  for _ = 1, runs do
    local count = tonumber(ARGV[at + 2])
    at = at + 3 + (ARGV[at + 1] == 'd' and 2 * count or count)
  end
  return at
end

local function put_aside(place, message, reason)
  redis.call('HSET', base .. ':dead', place, reason .. '\0' .. message)
  redis.call('ZADD', base .. ':died', now, place)
  redis.call('ZADD', base .. ':deadids', 0, id_of(message) .. '\0' .. place)
end

local function forget_old_letters()
  local before = string.format('%.0f', now - ARGV[1])
  for _, place in ipairs(redis.call('ZRANGE', base .. ':died', '-inf', before, 'BYSCORE', 'LIMIT', 0, BATCH)) do
    local letter = redis.call('HGET', base .. ':dead', place)
    local message = string.sub(letter, string.find(letter, '\0', 1, true) + 1)
    redis.call('ZREM', base .. ':deadids', id_of(message) .. '\0' .. place)
    redis.call('HDEL', base .. ':dead', place)
    redis.call('ZREM', base .. ':died', place)
  end
end

local lost, done, released, at = {}, {}, {}, 2
while at <= #ARGV do
  local batch, index, action, runs = ARGV[at], ARGV[at + 1], ARGV[at + 2], tonumber(ARGV[at + 4])
  local message, name = find(base, batch, index)
  if message then
    if action == 'dead' then
      put_aside(batch .. '-' .. index, message, ARGV[at + 3])
    elseif action == 'release' then
      released[#released + 1] = message
    end
    done[#done + 1] = {name, index}
    at = store(at + 5, runs)
  else
    lost[#lost + 1] = batch .. '-' .. index
    at = skip(at + 5, runs)
  end
end
for index = #released, 1, -1 do
  make_ready(base, 'LPUSH', level_of(released[index]), released, index, index)
  ring(base)
end
for _, place in ipairs(done) do -- last: should anything above fail, nothing is lost
  remove(base, place[1], place[2])
end
forget_old_letters()
return lost
