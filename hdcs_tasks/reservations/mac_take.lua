-- needs: epoch_guard
-- Give a VM its MAC, for good. Returns the MAC, or '' where the proposed one is another VM's.
--
-- KEYS[1]  epoch:run_id
-- KEYS[2]  mac:of_vm   hash   VM -> MAC
-- KEYS[3]  mac:owner   hash   MAC -> VM
-- ARGV     vm, proposed MAC (random; uniqueness is decided here)
local own = redis.call('HGET', KEYS[2], ARGV[1])
if own then
  return own
end
if redis.call('HSETNX', KEYS[3], ARGV[2], ARGV[1]) == 0 then
  return ''
end
redis.call('HSET', KEYS[2], ARGV[1], ARGV[2])
return ARGV[2]
