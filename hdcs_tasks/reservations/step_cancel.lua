-- Ask whoever holds, or will hold, this attempt to stop. Returns 1, or 0 where it is not the present one: whoever asked
-- looked before a newer one was issued, which may have to observe first.
--
-- KEYS[1]  step:<step>   hash EX   attempt, cancel
-- ARGV     attempt
if redis.call('HGET', KEYS[1], 'attempt') ~= ARGV[1] then
  return 0
end
redis.call('HSET', KEYS[1], 'cancel', 1)
return 1
