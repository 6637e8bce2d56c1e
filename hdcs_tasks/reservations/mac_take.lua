-- needs: epoch_guard
-- Give a VM its MAC, for good. Returns the MAC, or '' where the proposed one is another VM's.
--
-- KEYS[1]  epoch:run_id
-- KEYS[2]  mac:all   hash   VM -> MAC, and ':' and MAC -> VM: both directions in one place, read and written at once
-- ARGV     vm, proposed MAC (random; uniqueness is decided here)
local own, other = unpack(redis.call('HMGET', KEYS[2], ARGV[1], ':' .. ARGV[2]))
if own then
  return own
end
if other then
  return ''
end
redis.call('HSET', KEYS[2], ARGV[1], ARGV[2], ':' .. ARGV[2], ARGV[1])
return ARGV[2]
