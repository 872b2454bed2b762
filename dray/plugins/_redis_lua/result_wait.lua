#!lua flags=allow-oom
-- Finds results that have ended; if none has, has the caller told of each that will.
--   KEYS    of the results (their strings: see result_store)
--   ARGV    the caller's channel; ms for which to remember it where nothing is known yet
--   answer  index and string of each that is terminal
local found, olds = {}, {}
for i, key in ipairs(KEYS) do
  local old = redis.call('GET', key)
  olds[i] = old
  if old and string.find(old, '^[SFR]') then
    found[#found + 1] = i
    found[#found + 1] = old
  end
end
if #found > 0 then
  return found
end

local channel, lease_ms = ARGV[1], ARGV[2]
for i, key in ipairs(KEYS) do
  local old = olds[i]
  if not old or #old < 11 then
    redis.call('SET', key, struct.pack('>cdH', 'w', 0, #channel) .. channel, 'PX', lease_ms)
  else
    local waiting = string.sub(old, 12, 11 + struct.unpack('>H', string.sub(old, 10, 11)))
    if not string.find(',' .. waiting .. ',', ',' .. channel .. ',', 1, true) then
      local all = waiting == '' and channel or waiting .. ',' .. channel
      if #all < 65536 then -- else it looks again when its registration would run out
        local body = string.sub(old, 12 + #waiting)
        redis.call('SET', key, string.sub(old, 1, 9) .. struct.pack('>H', #all) .. all .. body, 'KEEPTTL')
      end
    end
    if string.sub(old, 1, 1) == 'w' then
      redis.call('PEXPIRE', key, lease_ms)
    end
  end
end
return found
