-- needs: epoch_guard, span
-- Give a VM its console port, its MAC and an IP of one server node: all three or none. address_take_many.lua does it
-- for many. Returns {port, ip, mac}, or why not: mac (propose another) | port | ip.
--
-- KEYS[1]  epoch:run_id
-- KEYS[2]  ports:<domain node>   see span.lua
-- KEYS[3]  ips:<server node>     see span.lua
-- KEYS[4]  mac:all               hash   see mac_take.lua
-- KEYS[5]  claims:<domain node>  hash   read: who holds a claim keeps its port
-- ARGV     vm, proposed MAC
local vm, mac = ARGV[1], ARGV[2]
-- Try to write and see: cheaper than to read first. What was written is taken back where the rest is not to be had.
local is_new_mac = redis.call('HSETNX', KEYS[4], vm, mac) == 1
if not is_new_mac then
  mac = redis.call('HGET', KEYS[4], vm)
elseif redis.call('HSETNX', KEYS[4], ':' .. mac, vm) == 0 then
  redis.call('HDEL', KEYS[4], vm)
  return 'mac'
end
local port, is_new_port = span_take(KEYS[2], vm, KEYS[5])
local ip = port and span_take(KEYS[3], vm)
if ip then
  return {port, ip, mac}
end
if is_new_mac then
  redis.call('HDEL', KEYS[4], vm, ':' .. mac)
end
if is_new_port and port then
  redis.call('HDEL', KEYS[2], vm)
  redis.call('RPUSH', KEYS[2] .. ':free', port)
end
return port and 'ip' or 'port'
