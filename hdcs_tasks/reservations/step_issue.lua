-- Issue an attempt of a step: from here on no older attempt can claim, renew or finish. Returns 1, or 0 where an
-- attempt as new is there already.
--
-- KEYS[1]  step:<step>         hash EX     attempt, nonce, node (where only that node may try)
-- KEYS[2]  lease:step:<step>   string PX   dropped: the old executor's
-- ARGV     attempt, nonce (the same call sent twice, its answer lost, is answered 1 twice), node or '', ttl_s
local attempt, nonce = unpack(redis.call('HMGET', KEYS[1], 'attempt', 'nonce'))
if attempt and tonumber(attempt) >= tonumber(ARGV[1]) then
  return (attempt == ARGV[1] and nonce == ARGV[2]) and 1 or 0
end
redis.call('DEL', KEYS[1], KEYS[2])
redis.call('HSET', KEYS[1], 'attempt', ARGV[1], 'nonce', ARGV[2])
if ARGV[3] ~= '' then
  redis.call('HSET', KEYS[1], 'node', ARGV[3])
end
redis.call('EXPIRE', KEYS[1], ARGV[4])
return 1
