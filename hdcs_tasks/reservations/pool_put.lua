-- needs: span, claims
-- Register a server node in its pool, or change its totals and flags; what is claimed on it stays accounted.
-- Returns 'ok', or 'elsewhere <domain node>', or 'subnet' where addresses of its old subnet are still owned.
--
-- KEYS[1]  pool:<domain node>     zset   server nodes with something free: score = free MiB * 65,536 + free vCPU
-- KEYS[2]  nodes:<domain node>    set    all its server nodes
-- KEYS[3]  claims:<domain node>   hash   see claims.lua; read once, when the node is new
-- KEYS[4]  node:<server node>     hash   domain_node, vcpus, memory_mib, used_vcpus, used_memory_mib, schedulable,
--                                        max_starts, tags, subnet
-- KEYS[5]  ips:<server node>      see span.lua; its bounds are those of the subnet
-- KEYS[6]  pools:all              set    domain nodes
-- ARGV     domain node, server node, vcpus, memory_mib, schedulable, max_starts, tags, subnet, ip_first, ip_last
local home, subnet, used_vcpus, used_memory =
  unpack(redis.call('HMGET', KEYS[4], 'domain_node', 'subnet', 'used_vcpus', 'used_memory_mib'))
if home and home ~= ARGV[1] then
  return 'elsewhere ' .. home
end
if home and subnet ~= ARGV[8] then
  if span_owners(KEYS[5]) > redis.call('ZCARD', KEYS[5] .. ':cooling') then
    return 'subnet'
  end
  redis.call('DEL', KEYS[5], KEYS[5] .. ':cooling', KEYS[5] .. ':free')
end
local first, last = unpack(redis.call('HMGET', KEYS[5], ':first', ':last'))
if ARGV[8] ~= '' and (first ~= ARGV[9] or last ~= ARGV[10]) then
  span_bounds(KEYS[5], tonumber(ARGV[9]), tonumber(ARGV[10]))
elseif ARGV[8] == '' and first then
  redis.call('HDEL', KEYS[5], ':first', ':last', ':next')
end
if not home then
  used_vcpus, used_memory = 0, 0
  for _, text in ipairs(redis.call('HVALS', KEYS[3])) do
    for _, claim in ipairs(claims_read(text)) do
      if claim.node == ARGV[2] then
        used_vcpus, used_memory = used_vcpus + claim.vcpus, used_memory + claim.memory
      end
    end
  end
end
redis.call('HSET', KEYS[4], 'domain_node', ARGV[1], 'vcpus', ARGV[3], 'memory_mib', ARGV[4], 'schedulable', ARGV[5],
  'max_starts', ARGV[6], 'tags', ARGV[7], 'subnet', ARGV[8],
  'used_vcpus', used_vcpus, 'used_memory_mib', used_memory)
redis.call('SADD', KEYS[2], ARGV[2])
redis.call('SADD', KEYS[6], ARGV[1])
pool_rank(KEYS[1], ARGV[2], ARGV[3] - used_vcpus, ARGV[4] - used_memory, ARGV[5] == '1')
return 'ok'
