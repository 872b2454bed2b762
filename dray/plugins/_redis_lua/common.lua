-- What the commands share; it is put in front of each of them.
--
-- All keys of a queue begin with its base, an element of KEYS, which holds the hash tag: they lie in one slot. The last
-- element of KEYS is there for clusters. While a slot moves, keys of a queue are here and there; because one of the
-- declared keys (the base) is nowhere, the cluster refuses every command for the queue until it is whole again.
--   :0 to :9   list    ready messages of that priority, the next one at the left
--   :levels    zset    which of the lists :1 to :9 may hold something (:0 is always looked into)
--   :delayed   zset    number (16 digits) .. message -> due, ms
--   :batch:*   hash    index (4 digits) -> message: what one claim took and was not settled yet
--   :leases    zset    batch -> end of its lease, ms
--   :numbers   string  the last number that was given out
--   :bell      list    one token while somebody should look; a consumer that waits pops it
--   :watch     string  some waiting consumer will look when the next message comes due, or lease ends; expires then
--   :dead      hash    place -> reason, NUL, message
--   :died      zset    place -> when, ms
--   :deadids   zset    id, NUL, place -> 0, for finding by id
-- A batch is named by a number. A message whose lease was extended apart from its batch is in one of its own, named
-- batch-index. A receipt is batch and index; place is batch-index.
-- A message: 'd1', times it was handed out in vain (4 hex digits), priority (1 digit), when sent (12 hex digits, ms),
-- length of the headers (6 hex digits), id, NUL, headers, body. What somebody else put among the ready messages is handed
-- out as it is.

local CHUNK = 4000 -- unpack() fails near 8000; even, so that pairs stay together
local BATCH = 1000 -- moved by one command at most
local SOON_MS = 5000 -- no consumer waits for longer without looking

table.remove(KEYS)

local now, now_us -- milliseconds and microseconds, once a command has looked

local function look_at_clock()
  local time = redis.call('TIME')
  now_us = time[1] * 1000000 + time[2]
  now = math.floor(now_us / 1000)
end

-- The first of `count` numbers that were never given out. They follow the clock, so that they are new even after the
-- server lost its last writes, or all.
local function reserve(base, count)
  local first = math.max(tonumber(redis.call('GET', base .. ':numbers') or 0) + 1, now_us)
  redis.call('SET', base .. ':numbers', first + count - 1)
  return first
end

local function ring(base)
  if redis.call('EXISTS', base .. ':bell') == 0 then
    redis.call('RPUSH', base .. ':bell', 1)
  end
end

local OURS = '^d1%x%x%x%x%d%x%x%x%x%x%x%x%x%x%x%x%x%x%x%x%x%x%x([^%z]+)%z'

local function id_of(message)
  return string.match(message, OURS) or 'foreign-' .. redis.sha1hex(message)
end

local function level_of(message)
  return string.match(message, '^d1%x%x%x%x(%d)') or '0'
end

-- Messages first..last of the list are ready, behind (RPUSH) or before (LPUSH) the others of their priority.
local function make_ready(base, command, level, messages, first, last)
  for at = first, last, CHUNK do
    redis.call(command, base .. ':' .. level, unpack(messages, at, math.min(at + CHUNK - 1, last)))
  end
  if level ~= '0' then
    redis.call('ZADD', base .. ':levels', level, level)
  end
end

-- The message of a receipt, and the batch that it is in; nil if the receipt is not good any more.
local function find(base, batch, index)
  for _, name in ipairs({batch, batch .. '-' .. index}) do
    local message = redis.call('HGET', base .. ':batch:' .. name, index)
    if message then
      return message, name
    end
  end
end

local function remove(base, name, index)
  redis.call('HDEL', base .. ':batch:' .. name, index)
  if redis.call('EXISTS', base .. ':batch:' .. name) == 0 then
    redis.call('ZREM', base .. ':leases', name)
  end
end

-- Stores pairs of due time (ms) and message: ARGV[at], ARGV[at + 1], ...
local function delay(base, at, count)
  look_at_clock()
  local number, first_due = reserve(base, count), math.huge
  for index = at, at + 2 * count - 1, 2 do
    local due, message = tonumber(ARGV[index]), ARGV[index + 1]
    if due <= now then
      make_ready(base, 'RPUSH', level_of(message), {message}, 1, 1)
      first_due = 0
    else
      redis.call('ZADD', base .. ':delayed', ARGV[index], string.format('%016.0f', number) .. message)
      first_due = math.min(first_due, due)
      number = number + 1
    end
  end
  local earliest = redis.call('ZRANGE', base .. ':delayed', 0, 0, 'WITHSCORES')[2]
  if first_due <= tonumber(earliest or 0) or first_due == 0 then
    ring(base) -- somebody has to look earlier than planned
  end
end

-- Stores runs of messages that begin at ARGV[at]: the index of the queue in KEYS, 'd' or the priority, how many, and
-- the messages, each after its due time if 'd'. Returns where the runs end.
local function store(at, runs)
  for _ = 1, runs do
    local base, kind, count = KEYS[tonumber(ARGV[at])], ARGV[at + 1], tonumber(ARGV[at + 2])
    at = at + 3
    if kind == 'd' then
      delay(base, at, count)
      at = at + 2 * count
    else
      make_ready(base, 'RPUSH', kind, ARGV, at, at + count - 1)
      ring(base)
      at = at + count
    end
  end
  return at
end
