-- needs: epoch_guard, span
-- Give a VM its console port in a domain node: its own again, also while cooling. Returns the port, 0: none free,
-- -1: the domain node has no range.
--
-- KEYS[1]  epoch:run_id
-- KEYS[2]  port_ranges:all       hash   domain node -> "<first>-<last>"
-- KEYS[3]  ports:<domain node>   see span.lua
-- KEYS[4]  claims:<domain node>  hash   read: who holds a claim keeps its port
-- ARGV     domain node, vm
local first, last = string.match(redis.call('HGET', KEYS[2], ARGV[1]) or '', '^(%d+)-(%d+)$')
if not first then
  return -1
end
return span_take(KEYS[3], tonumber(first), tonumber(last), ARGV[2], KEYS[4]) or 0
