-- Library: put in front of every allocating script. Needs KEYS[1] = epoch:run_id.
--
-- epoch:run_id   string   the Redis run_id the reservations were last rebuilt for (read only here)
--
-- Fails closed: a Redis that restarted (and may have lost its last second) has another run_id, a wiped one has no key.
do
  local epoch = redis.call('GET', KEYS[1])
  if not epoch or not string.find(redis.call('INFO', 'server'), 'run_id:' .. epoch, 1, true) then
    return redis.error_reply('HDCSCLOSED reservations wait for a rebuild')
  end
end
