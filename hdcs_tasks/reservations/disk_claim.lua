-- needs: epoch_guard
-- Promise a VM bytes of a domain node's storage, within a limit. The same VM again changes its promise.
-- Returns {1, bytes promised in all} or {0, bytes promised in all}: it would pass the limit.
--
-- KEYS[1]  epoch:run_id
-- KEYS[2]  disk:<domain node>        hash     VM -> bytes
-- KEYS[3]  disk:<domain node>:used   string   their sum
-- ARGV     vm, bytes, limit_bytes
local old = tonumber(redis.call('HGET', KEYS[2], ARGV[1]) or 0)
local used = tonumber(redis.call('GET', KEYS[3]) or 0)
local more = tonumber(ARGV[2]) - old
if more > 0 and used + more > tonumber(ARGV[3]) then
  return {0, used}
end
redis.call('HSET', KEYS[2], ARGV[1], ARGV[2])
redis.call('INCRBY', KEYS[3], string.format('%.0f', more))
return {1, used + more}
