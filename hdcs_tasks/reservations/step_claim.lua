-- Claim an attempt of a step: it exists, is this attempt, is not done, not cancelled, and nobody else holds it.
-- Returns claimed | taken | stale | missing | done | cancelled. The same holder again is 'claimed'.
--
-- KEYS[1]  step:<step>         hash EX     attempt, holder, node, done, cancel, handed
-- KEYS[2]  lease:step:<step>   string PX   the holder
-- ARGV     attempt, holder, node, ttl_ms, key_ttl_s
local attempt, holder, done, cancel = unpack(redis.call('HMGET', KEYS[1], 'attempt', 'holder', 'done', 'cancel'))
if not attempt then return 'missing' end
if attempt ~= ARGV[1] then return 'stale' end
if done then return 'done' end
if holder and holder ~= ARGV[2] then return 'taken' end
if cancel then return 'cancelled' end
redis.call('HSET', KEYS[1], 'holder', ARGV[2], 'node', ARGV[3])
redis.call('HDEL', KEYS[1], 'handed')
redis.call('EXPIRE', KEYS[1], ARGV[5])
redis.call('SET', KEYS[2], ARGV[2], 'PX', ARGV[4])
return 'claimed'
