-- Renew a lease that is still the holder's own. Returns 1 or 0.
--
-- KEYS[1]  lease:<kind>:<name>   string PX   the holder
-- ARGV     holder, ttl_ms
if redis.call('GET', KEYS[1]) ~= ARGV[1] then
  return 0
end
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return 1
