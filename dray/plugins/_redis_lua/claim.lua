#!lua flags=allow-oom
-- Hands out messages under a lease: all that came due, and what others' leases no longer guard, among them.
--   KEYS    the bases of the queues, preferred ones first
--   ARGV    at most so many (BATCH at most); length of the lease, ms; '1' if the consumer will wait when there is
--           nothing; '1' if it kept watch until now
--   answer  ms until the consumer has to look again because it keeps watch now, or -1;
--           for each queue that gave any: {its index in KEYS, batch, message 1, message 2, ...}
look_at_clock()
local wanted, until_ms = tonumber(ARGV[1]), string.format('%.0f', now + ARGV[2])
local will_wait, kept_watch = ARGV[3] == '1', ARGV[4] == '1'

-- The message, handed out in vain once more.
local function charged(message)
  local count = string.match(message, '^d1(%x%x%x%x)')
  if not count then
    return message
  end
  return 'd1' .. string.format('%04x', math.min(tonumber(count, 16) + 1, 65535)) .. string.sub(message, 7)
end

local function take_back_batch(base, batch)
  local fields, messages = redis.call('HGETALL', base .. ':batch:' .. batch), {}
  local indexes = {}
  for at = 1, #fields, 2 do
    indexes[#indexes + 1] = fields[at]
    messages[fields[at]] = fields[at + 1]
  end
  table.sort(indexes)
  for at = #indexes, 1, -1 do
    local message = charged(messages[indexes[at]])
    make_ready(base, 'LPUSH', level_of(message), {message}, 1, 1)
  end
  redis.call('DEL', base .. ':batch:' .. batch)
  redis.call('ZREM', base .. ':leases', batch)
end

local function take_back(base)
  local ended = redis.call('ZRANGE', base .. ':leases', '-inf', now, 'BYSCORE', 'LIMIT', 0, BATCH)
  local last, count = 0, 0
  while last < #ended and count < BATCH do
    last = last + 1
    count = count + redis.call('HLEN', base .. ':batch:' .. ended[last])
  end
  for at = last, 1, -1 do -- to the front: those whose lease ended first come first
    take_back_batch(base, ended[at])
  end
end

local function promote(base)
  local due = redis.call('ZRANGE', base .. ':delayed', '-inf', now, 'BYSCORE', 'LIMIT', 0, BATCH)
  for _, member in ipairs(due) do
    local message = string.sub(member, 17)
    make_ready(base, 'RPUSH', level_of(message), {message}, 1, 1)
  end
  if #due > 0 then
    redis.call('ZREMRANGEBYRANK', base .. ':delayed', 0, #due - 1)
  end
end

-- Up to `wanted` messages, and whether more are ready.
local function pop(base)
  redis.call('STRLEN', base .. ':numbers') -- a key of another type fails here, before anything is taken
  local levels, found, more = redis.call('ZREVRANGE', base .. ':levels', 0, -1), {}, false
  levels[#levels + 1] = '0'
  for _, level in ipairs(levels) do
    local list = base .. ':' .. level
    if wanted > 0 then
      local some = redis.call('LPOP', list, wanted) or {}
      if #found == 0 then
        found = some
      else
        for _, message in ipairs(some) do
          found[#found + 1] = message
        end
      end
      wanted = wanted - #some
    end
    if redis.call('EXISTS', list) == 1 then
      more = true
    elseif level ~= '0' then
      redis.call('ZREM', base .. ':levels', level)
    end
  end
  return found, more
end

local function lease(base, messages)
  local batch, fields = reserve(base, 1), {}
  for index, message in ipairs(messages) do
    fields[2 * index - 1], fields[2 * index] = string.format('%04d', index), message
  end
  redis.call('HSET', base .. ':batch:' .. string.format('%.0f', batch), unpack(fields))
  redis.call('ZADD', base .. ':leases', until_ms, batch)
  return batch
end

local function next_change(base)
  local change = math.huge
  for _, key in ipairs({':delayed', ':leases'}) do
    change = math.min(change, tonumber(redis.call('ZRANGE', base .. key, 0, 0, 'WITHSCORES')[2] or math.huge))
  end
  return change
end

-- Who takes messages goes to work, and one who only polls goes away: if more is ready, or will be soon, somebody else
-- has to see to it. One waiting consumer is enough. Returns when this one has to look again, ms from now.
local function pass_on(base, more, waits)
  local left_ms = more and 0 or next_change(base) - now
  local is_watched = left_ms > SOON_MS
  if not more and not is_watched then
    local watch_ms = redis.call('PTTL', base .. ':watch')
    is_watched = watch_ms >= 0 and watch_ms <= left_ms + 1
  end
  if more or not (is_watched or waits) then
    ring(base)
    return math.huge
  end
  redis.call('DEL', base .. ':bell')
  if is_watched then
    return math.huge
  end
  left_ms = math.max(left_ms, 0) + 1
  redis.call('SET', base .. ':watch', 1, 'PX', string.format('%.0f', left_ms))
  return left_ms
end

local answer, more, look_ms = {-1}, {}, math.huge
for index, base in ipairs(KEYS) do
  if wanted > 0 then
    take_back(base)
    promote(base)
    local messages
    messages, more[index] = pop(base)
    if #messages > 0 then
      answer[#answer + 1] = {index, lease(base, messages), unpack(messages)}
    end
  end
end
for index, is_more in ipairs(more) do
  if kept_watch then
    redis.call('DEL', KEYS[index] .. ':watch')
  end
  look_ms = math.min(look_ms, pass_on(KEYS[index], is_more, will_wait and #answer == 1))
end
if look_ms < math.huge then
  answer[1] = look_ms
end
return answer
