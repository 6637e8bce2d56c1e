-- Drop a lease that is the holder's own. Returns 1 or 0.
--
-- KEYS[1]  lease:<kind>:<name>   string PX   the holder
-- ARGV     holder
if redis.call('GET', KEYS[1]) ~= ARGV[1] then
  return 0
end
return redis.call('DEL', KEYS[1])
