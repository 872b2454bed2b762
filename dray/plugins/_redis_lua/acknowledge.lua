#!lua flags=allow-oom
-- Removes deliveries that are done: the settlement of most messages.
--   KEYS    the base of the queue
--   ARGV    for each batch: its number, how many, indexes, none twice
--   answer  the places (batch-index) whose receipts were no longer good
local base, lost, at = KEYS[1], {}, 1
while at <= #ARGV do
  local batch, count = ARGV[at], tonumber(ARGV[at + 1])
  local key = base .. ':batch:' .. batch
  at = at + 2
  for index = at, at + count - 1 do
    if redis.call('HDEL', key, ARGV[index]) == 0 then
      local place = batch .. '-' .. ARGV[index]
      if find(base, place, ARGV[index]) then
        remove(base, place, ARGV[index])
      else
        lost[#lost + 1] = place
      end
    end
  end
  if redis.call('EXISTS', key) == 0 then
    redis.call('ZREM', base .. ':leases', batch)
  end
  at = at + count
end
return lost
