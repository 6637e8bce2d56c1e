-- Take a MAC back from a VM that is deleted. Returns 1, or 0 where it had none.
--
-- KEYS[1]  mac:all   hash   VM -> MAC, and ':' and MAC -> VM
-- ARGV     vm
local own = redis.call('HGET', KEYS[1], ARGV[1])
if not own then
  return 0
end
redis.call('HDEL', KEYS[1], ARGV[1], ':' .. own)
return 1
