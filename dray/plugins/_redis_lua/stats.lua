#!lua flags=no-writes
-- How full a queue is.
--   KEYS    the base of the queue
--   answer  ready, leased, delayed, dead; age of the oldest ready message, ms (-1: nothing is ready)
look_at_clock()
local base, ready, leased, sent = KEYS[1], 0, 0, math.huge
for level = 0, 9 do
  local list = base .. ':' .. level
  local length = redis.call('LLEN', list)
  if length > 0 then
    ready = ready + length
    sent = math.min(sent, tonumber(string.sub(redis.call('LINDEX', list, 0), 8, 19), 16) or now)
  end
end
ready = ready + redis.call('ZCOUNT', base .. ':delayed', '-inf', now)
local leases = redis.call('ZRANGE', base .. ':leases', 0, -1, 'WITHSCORES')
for at = 1, #leases, 2 do
  local count = redis.call('HLEN', base .. ':batch:' .. leases[at])
  if tonumber(leases[at + 1]) <= now then
    ready = ready + count
  else
    leased = leased + count
  end
end
return {
  ready,
  leased,
  redis.call('ZCOUNT', base .. ':delayed', '(' .. now, '+inf'),
  redis.call('HLEN', base .. ':dead'),
  sent < math.huge and math.max(now - sent, 0) or -1,
}
