#!lua
-- Stores results: over a state that is not terminal, never over one that is; tells those who wait.
--   KEYS    of the results
--   ARGV    for each: its string; ms until it expires, or '' for never
--   answer  none
-- A string: the state's letter (a capital is terminal; 'w': nothing is known, somebody waits), expires_at (a double),
-- the length of the channels of those who wait (2 bytes), these with commas between, the body.
local call = redis.call

local function waiting_at(key, head)
  if #head < 11 or not string.find(head, '^[psrw]') then
    return ''
  end
  local length = struct.unpack('>H', string.sub(head, 10, 11))
  return length > 0 and call('GETRANGE', key, 11, 10 + length) or ''
end

local function replace(key, new, ttl)
  local head = call('GETRANGE', key, 0, 10)
  if string.find(head, '^[SFR]') then
    return
  end
  local waiting = waiting_at(key, head)
  if string.find(new, '^[SFR]') then
    -- What is published fast piles up, and a listener with 32 MB of it is cut off: a large result is announced only.
    local news = struct.pack('>H', #key) .. key .. (#new <= 8192 and new or '')
    for channel in string.gmatch(waiting, '[^,]+') do
      call('PUBLISH', channel, news)
    end
  else
    new = string.sub(new, 1, 9) .. struct.pack('>H', #waiting) .. waiting .. string.sub(new, 12)
  end
  if ttl == '' then call('SET', key, new) else call('SET', key, new, 'PX', ttl) end
end

for i, key in ipairs(KEYS) do
  local new, ttl, is_stored = ARGV[2 * i - 1], ARGV[2 * i], nil
  if ttl == '' then is_stored = call('SET', key, new, 'NX') else is_stored = call('SET', key, new, 'NX', 'PX', ttl) end
  if not is_stored then
    replace(key, new, ttl)
  end
end
