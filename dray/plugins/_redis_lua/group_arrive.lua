#!lua
-- Notes that a member of a group arrived.
--   KEYS    of the group: a hash with a field for each member ('m' and its name), and 'last', who completed it
--   ARGV    the member; the size of the group; ms for which to remember the group
--   answer  1 for the member that completed the group, whenever it arrives, else 0
if redis.call('HSETNX', KEYS[1], 'm' .. ARGV[1], '') == 1 and redis.call('HLEN', KEYS[1]) == tonumber(ARGV[2]) then
  redis.call('HSET', KEYS[1], 'last', ARGV[1])
end
redis.call('PEXPIRE', KEYS[1], ARGV[3])
return redis.call('HGET', KEYS[1], 'last') == ARGV[1] and 1 or 0
