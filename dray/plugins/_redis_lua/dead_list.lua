#!lua flags=no-writes
-- The newest dead letters of a queue.
--   KEYS    the base of the queue
--   ARGV    at most so many
--   answer  place, when it died (ms), letter; and so on
local base, answer = KEYS[1], {}
local newest = redis.call('ZREVRANGE', base .. ':died', 0, ARGV[1] - 1, 'WITHSCORES')
for index = 1, #newest, 2 do
  answer[#answer + 1], answer[#answer + 2] = newest[index], newest[index + 1]
  answer[#answer + 1] = redis.call('HGET', base .. ':dead', newest[index])
end
return answer
