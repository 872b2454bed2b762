#!lua flags=allow-oom
-- Remembers names of queues: a cluster has no place where all keys can be seen.
--   KEYS    the set of names
--   ARGV    names
--   answer  1
redis.call('SADD', KEYS[1], unpack(ARGV))
return 1
