#!lua flags=allow-oom
-- Makes leases end later (or sooner).
--   KEYS    the base of the queue
--   ARGV    length from now, ms; for each batch: its number, how many, indexes, none twice
--   answer  the places (batch-index) whose receipts were no longer good
look_at_clock()
local base, leases, lost, at = KEYS[1], KEYS[1] .. ':leases', {}, 2
local until_ms = string.format('%.0f', now + ARGV[1])

local function extend_apart(batch, index)
  local message, name = find(base, batch, index)
  local place = batch .. '-' .. index
  if message then
    redis.call('HSET', base .. ':batch:' .. place, index, message)
    redis.call('ZADD', leases, until_ms, place)
    if name ~= place then
      remove(base, name, index)
    end
  end
  return message
end

while at <= #ARGV do
  local batch, count = ARGV[at], tonumber(ARGV[at + 1])
  local key, held = base .. ':batch:' .. batch, 0
  at = at + 2
  for index = at, at + count - 1 do
    held = held + redis.call('HEXISTS', key, ARGV[index])
  end
  local is_whole = held > 0 and held == redis.call('HLEN', key)
  if is_whole then
    redis.call('ZADD', leases, until_ms, batch)
  end
  for index = at, at + count - 1 do
    local is_extended = is_whole and redis.call('HEXISTS', key, ARGV[index]) == 1
    if not is_extended and not extend_apart(batch, ARGV[index]) then
      lost[#lost + 1] = batch .. '-' .. ARGV[index]
    end
  end
  at = at + count
end
return lost
