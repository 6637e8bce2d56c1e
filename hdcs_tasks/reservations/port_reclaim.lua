-- needs: span
-- Return cooled ports to the free list. Returns how many. A VM that still holds a claim in the domain node keeps its
-- port: its cooling was asked for too early and is looked at again a minute later.
--
-- KEYS[1]  ports:<domain node>    see span.lua
-- KEYS[2]  claims:<domain node>   hash   see claims.lua
-- ARGV     most to return in one call
local now = now_ms()
for _, vm in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1] .. ':cooling', '-inf', now, 'LIMIT', 0, ARGV[1])) do
  if redis.call('HEXISTS', KEYS[2], vm) == 1 then
    redis.call('ZADD', KEYS[1] .. ':cooling', now + 60000, vm)
  end
end
return span_reclaim(KEYS[1], tonumber(ARGV[1]))
