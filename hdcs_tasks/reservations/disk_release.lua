-- Take back a VM's promise of storage. Returns 1, or 0 where it had none.
--
-- KEYS[1]  disk:<domain node>        hash     VM -> bytes
-- KEYS[2]  disk:<domain node>:used   string   their sum
-- ARGV     vm
local old = redis.call('HGET', KEYS[1], ARGV[1])
if not old then
  return 0
end
redis.call('HDEL', KEYS[1], ARGV[1])
redis.call('DECRBY', KEYS[2], old)
return 1
