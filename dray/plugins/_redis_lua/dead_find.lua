#!lua flags=allow-oom
-- The dead letters of these ids; deletes them if told to.
--   KEYS    the base of the queue
--   ARGV    'delete' or ''; the ids
--   answer  place, when it died (ms), letter; and so on
local base, answer = KEYS[1], {}
for at = 2, #ARGV do
  local id = ARGV[at] .. '\0'
  for _, member in ipairs(redis.call('ZRANGE', base .. ':deadids', '[' .. id, '(' .. ARGV[at] .. '\1', 'BYLEX')) do
    local place = string.sub(member, #id + 1)
    answer[#answer + 1], answer[#answer + 2] = place, redis.call('ZSCORE', base .. ':died', place)
    answer[#answer + 1] = redis.call('HGET', base .. ':dead', place)
    if ARGV[1] == 'delete' then
      redis.call('ZREM', base .. ':deadids', member)
      redis.call('ZREM', base .. ':died', place)
      redis.call('HDEL', base .. ':dead', place)
    end
  end
end
return answer
