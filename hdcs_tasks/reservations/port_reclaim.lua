-- needs: span
-- Return cooled ports to the free list. Returns how many. A VM that still holds a claim in the domain node keeps its
-- port: its cooling was asked for too early and is looked at again a minute later.
--
-- KEYS[1]  port_ranges:all        hash   domain node -> "<first>-<last>"
-- KEYS[2]  ports:<domain node>    see span.lua
-- KEYS[3]  claims:<domain node>   hash   see claims.lua
-- ARGV     domain node, most to return in one call
local first, last = string.match(redis.call('HGET', KEYS[1], ARGV[1]) or '', '^(%d+)-(%d+)$')
if not first then
  return 0
end
local now = now_ms()
for _, vm in ipairs(redis.call('ZRANGEBYSCORE', KEYS[2] .. ':cooling', '-inf', now, 'LIMIT', 0, ARGV[2])) do
  if redis.call('HEXISTS', KEYS[3], vm) == 1 then
    redis.call('ZADD', KEYS[2] .. ':cooling', now + 60000, vm)
  end
end
return span_reclaim(KEYS[2], tonumber(first), tonumber(last), tonumber(ARGV[2]))
