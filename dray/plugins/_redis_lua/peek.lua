#!lua flags=no-writes
-- Waiting messages, ready ones first, in the order they would be handed out.
--   KEYS    the base of the queue
--   ARGV    at most so many
--   answer  due time, ms ('' for ready ones), message; and so on
local base, left, answer = KEYS[1], tonumber(ARGV[1]), {}
for level = 9, 0, -1 do
  if left > 0 then
    for _, message in ipairs(redis.call('LRANGE', base .. ':' .. level, 0, left - 1)) do
      answer[#answer + 1], answer[#answer + 2] = '', message
      left = left - 1
    end
  end
end
if left > 0 then
  local delayed = redis.call('ZRANGE', base .. ':delayed', 0, left - 1, 'WITHSCORES')
  for index = 1, #delayed, 2 do
    answer[#answer + 1], answer[#answer + 2] = delayed[index + 1], string.sub(delayed[index], 17)
  end
end
return answer
