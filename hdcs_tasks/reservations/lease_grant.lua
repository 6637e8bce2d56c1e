-- Grant a lease unless another living holder has it. Returns 1 or 0.
--
-- KEYS[1]  lease:<kind>:<name>   string PX   the holder
-- ARGV     holder, ttl_ms
local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then
  return 0
end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
