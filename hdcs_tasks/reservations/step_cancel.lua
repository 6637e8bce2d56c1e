-- Ask whoever holds, or will hold, the present attempt to stop. Returns 1, or 0 where no attempt was issued.
--
-- KEYS[1]  step:<step>   hash EX   cancel
if redis.call('EXISTS', KEYS[1]) == 0 then
  return 0
end
redis.call('HSET', KEYS[1], 'cancel', 1)
return 1
