-- needs: epoch_guard, span
-- Give a VM its console port in a domain node: its own again, also while cooling. Returns the port, 0: none free,
-- -1: the domain node has no range.
--
-- KEYS[1]  epoch:run_id
-- KEYS[2]  ports:<domain node>   see span.lua
-- KEYS[3]  claims:<domain node>  hash   read: who holds a claim keeps its port
-- ARGV     vm
local port = span_take(KEYS[2], ARGV[1], KEYS[3])
if port then
  return port
end
return redis.call('HEXISTS', KEYS[2], ':first') - 1
