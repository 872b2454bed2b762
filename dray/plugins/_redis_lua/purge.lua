#!lua flags=allow-oom
-- Deletes what waits in a queue: ready and delayed messages.
--   KEYS    the base of the queue
--   answer  how many
local base, count = KEYS[1], 0
for level = 0, 9 do
  count = count + redis.call('LLEN', base .. ':' .. level)
  redis.call('UNLINK', base .. ':' .. level)
end
count = count + redis.call('ZCARD', base .. ':delayed')
redis.call('UNLINK', base .. ':delayed', base .. ':levels', base .. ':bell')
return count
