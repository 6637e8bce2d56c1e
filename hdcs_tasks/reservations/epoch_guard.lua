-- Library: put in front of every allocating script. Needs KEYS[1] = epoch:run_id.
--
-- epoch:run_id   string   the Redis run_id the reservations were last rebuilt for (read only here)
--
-- Fails closed unless the epoch is the run_id that stands below. Asking Redis for its run_id in every call (INFO) costs
-- more than all the rest of a small script, so it is asked once, and what remembers the answer is something no restart
-- survives: the script cache. scripts.py puts the run_id it read into the text and loads the text over the very
-- connection it read it from; a connection ends with its process, so a text is only ever known to the process whose
-- run_id stands in it. Hence:
--   restarted (a lost second too)  the new process knows no script: the caller loads one with the new run_id, which is
--                                  not the epoch: closed until the rebuild
--   emptied                        no epoch: closed
--   SCRIPT FLUSH                   loaded again, after asking again
--   a replica was promoted         another process, another run_id: closed until the rebuild
-- This needs Redis 7: older ones write loaded scripts to the AOF and to replicas, so scripts.py refuses them. Not
-- seen: a primary that lost that role and got it back within one process's life, its data replaced in between. Redis
-- that was demoted must be restarted before it is primary again (docs/architecture.md).
if redis.call('GET', KEYS[1]) ~= '@RUN_ID@' then
  return redis.error_reply('HDCSCLOSED reservations wait for a rebuild')
end
