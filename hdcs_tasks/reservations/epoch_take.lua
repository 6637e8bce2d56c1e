-- Take a rebuild in hand, unless the reservations are open: allocation stays closed, and whoever took it in hand
-- before can no longer end it (rebuild.py). Returns 1, or 0 where it is open.
--
-- KEYS[1]  epoch:run_id   string   run_id of the last rebuild, or "closed:<token>" while one is in hand
-- ARGV     run_id of this Redis, token
if redis.call('GET', KEYS[1]) == ARGV[1] then
  return 0
end
redis.call('SET', KEYS[1], 'closed:' .. ARGV[2])
return 1
