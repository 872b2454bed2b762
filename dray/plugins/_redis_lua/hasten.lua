#!lua flags=allow-oom
-- Makes delayed messages due now, one part of a queue at a time.
--   KEYS    the base of the queue
--   ARGV    cursor, '0' at first; the ids
--   answer  the next cursor, '0' after the last part
look_at_clock()
local base, wanted = KEYS[1], {}
for index = 2, #ARGV do
  wanted[ARGV[index]] = true
end
local part = redis.call('ZSCAN', base .. ':delayed', ARGV[1], 'COUNT', BATCH)
local found = false
for index = 1, #part[2], 2 do
  local member = part[2][index]
  if wanted[id_of(string.sub(member, 17))] then
    redis.call('ZADD', base .. ':delayed', now, member)
    found = true
  end
end
if found then
  ring(base)
end
return part[1]
