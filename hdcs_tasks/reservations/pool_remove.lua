-- needs: claims
-- Take a server node out of its pool. Returns the VMs that hold claims on it; where there are any it stays, unless
-- forced (the claims then stay until each is released).
--
-- KEYS[1]  pool:<domain node>     zset   see pool_put.lua
-- KEYS[2]  nodes:<domain node>    set
-- KEYS[3]  claims:<domain node>   hash   see claims.lua
-- KEYS[4]  node:<server node>     hash   see pool_put.lua
-- KEYS[5]  starts:<server node>   zset   see pool_place.lua
-- ARGV     server node, forced (0 or 1)
local holders = {}
local all = redis.call('HGETALL', KEYS[3])
for i = 1, #all, 2 do
  for _, claim in ipairs(claims_read(all[i + 1])) do
    if claim.node == ARGV[1] then holders[#holders + 1] = all[i] end
  end
end
if #holders == 0 or ARGV[2] == '1' then
  redis.call('ZREM', KEYS[1], ARGV[1])
  redis.call('SREM', KEYS[2], ARGV[1])
  redis.call('DEL', KEYS[4], KEYS[5])
end
return holders
