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
local own, other = unpack(redis.call('HMGET', KEYS[4], vm, ':' .. mac))
if other and not own then
  return 'mac'
end
local port, is_new = span_take(KEYS[2], vm, KEYS[5])
if not port then
  return 'port'
end
local ip = span_take(KEYS[3], vm)
if not ip then
  if is_new then
    redis.call('HDEL', KEYS[2], vm)
    redis.call('RPUSH', KEYS[2] .. ':free', port)
  end
  return 'ip'
end
if not own then
  redis.call('HSET', KEYS[4], vm, mac, ':' .. mac, vm)
end
return {port, ip, own or mac}
