-- needs: epoch_guard, span, claims
-- Pick the server node for a VM and claim vCPU, memory, console port, IP and MAC in one go: all or nothing.
-- Returns {'ok', node, port, ip, mac}; {'mac'}: propose another MAC; {'two', node, node}: the VM holds two claims;
-- {'amounts', node}: it holds a claim of another size; {'no', port reason or '', node, free vCPU, free MiB, why, …}.
--
-- KEYS[1]   epoch:run_id
-- KEYS[2]   pool:<domain node>     zset   server nodes with something free: score = free MiB * 65,536 + free vCPU
-- KEYS[3]   nodes:<domain node>    set    all its server nodes (read to explain a refusal)
-- KEYS[4]   claims:<domain node>   hash   see claims.lua
-- KEYS[5]   ports:<domain node>    see span.lua
-- KEYS[6]   port_ranges:all        hash   domain node -> "<first>-<last>"
-- KEYS[7]   mac:of_vm              hash   VM -> MAC
-- KEYS[8]   mac:owner              hash   MAC -> VM
-- <prefix>node:<server node>       hash   see pool_put.lua
-- <prefix>ips:<server node>        see span.lua
-- <prefix>starts:<server node>     zset   VM -> time (ms) from which its start no longer counts as under way
-- ARGV      prefix, domain node, vm, step, vcpus, memory_mib, pin or '', ",excluded,", port 0|1, ip 0|1,
--           proposed MAC or '', order pack|spread, ",required,tags,", start_ms, mix "vcpus,memory_mib,weight;…" or ''
local prefix, vm, step = ARGV[1], ARGV[3], ARGV[4]
local vcpus, memory = tonumber(ARGV[5]), tonumber(ARGV[6])
local pin, excluded, order = ARGV[7], ARGV[8], ARGV[12]

local function is_in(list, name)
  return string.find(list, ',' .. name .. ',', 1, true) ~= nil
end

-- What the VM holds already: the same request again, or a later step of a VM that was never seen to stop.
local claims = claims_read(redis.call('HGET', KEYS[4], vm))
local mine
for _, c in ipairs(claims) do
  if not is_in(excluded, c.node) and (pin == '' or pin == c.node) and (not mine or c.step == step) then
    mine = c
  end
end
if mine then
  if mine.vcpus ~= vcpus or mine.memory ~= memory then
    return {'amounts', mine.node}
  end
  if mine.step ~= step then
    mine.step = step
    claims_write(KEYS[4], vm, claims)
  end
  redis.call('ZREM', KEYS[5] .. ':cooling', vm)
  return {'ok', mine.node, mine.port, string.format('%.0f', mine.ip), redis.call('HGET', KEYS[7], vm) or ''}
end
if #claims > 1 then
  return {'two', claims[1].node, claims[2].node}
end

local mac = ''
if ARGV[11] ~= '' then
  mac = redis.call('HGET', KEYS[7], vm)
  if not mac and redis.call('HEXISTS', KEYS[8], ARGV[11]) == 1 then
    return {'mac'}
  end
end

-- Why the node cannot take the VM, in one word; nil: it can, and an IP of it is now the VM's (second value).
local function refusal(node, facts, dry)
  if pin ~= '' and node ~= pin then return 'unpinned' end
  if is_in(excluded, node) then return 'excluded' end
  if facts[5] ~= '1' then return 'draining' end
  for tag in string.gmatch(ARGV[13], '[^,]+') do
    if not is_in(facts[7], tag) then return 'tag ' .. tag end
  end
  if facts[2] - facts[4] < memory then return 'memory' end
  if facts[1] - facts[3] < vcpus then return 'vcpus' end
  if tonumber(facts[6]) > 0 then
    local starts = prefix .. 'starts:' .. node
    redis.call('ZREMRANGEBYSCORE', starts, '-inf', now_ms())
    if redis.call('ZCARD', starts) >= tonumber(facts[6]) then return 'starts' end
  end
  if ARGV[10] == '1' then
    if tonumber(facts[8]) == 0 then return 'no subnet' end
    if dry then return dry end
    local ip = span_take(prefix .. 'ips:' .. node, tonumber(facts[8]), tonumber(facts[9]), vm)
    if not ip then return 'ip' end
    return nil, ip
  end
  return nil, 0
end

local function facts_of(node)
  return redis.call('HMGET', prefix .. 'node:' .. node, 'vcpus', 'memory_mib', 'used_vcpus', 'used_memory_mib',
    'schedulable', 'max_starts', 'tags', 'ip_first', 'ip_last')
end

local mix = {}
for v, m, w in string.gmatch(ARGV[15], '(%d+),(%d+),([%d.]+)') do
  mix[#mix + 1] = {tonumber(v), tonumber(m), tonumber(w)}
end

-- Future VMs (weighted by the mix) that no longer fit on a node once this VM is on it. Counted in fractions, so that it
-- shows on an empty node too what wastes the scarcer resource, and a little in whole VMs, which decides near the end.
local function lost(free_vcpus, free_memory)
  local sum = 0
  for _, p in ipairs(mix) do
    local v, m, w = p[1], p[2], p[3]
    local before = math.min(free_vcpus / v, free_memory / m)
    local after = math.min((free_vcpus - vcpus) / v, (free_memory - memory) / m)
    sum = sum + (before - after + 0.1 * (math.floor(before) - math.floor(after))) * w
  end
  return sum
end

-- The nodes of one page that have room, best first: by score as they come, or by fewest future VMs lost.
local function candidates(page)
  local found = {}
  for i = 1, #page, 2 do
    local score = tonumber(page[i + 1])
    local free_memory = math.floor(score / 65536)
    local free_vcpus = score - free_memory * 65536
    if free_vcpus >= vcpus and free_memory >= memory then
      found[#found + 1] = {page[i], #mix > 0 and lost(free_vcpus, free_memory) or 0, #found}
    end
  end
  if #mix > 0 then
    table.sort(found, function(a, b) return a[2] < b[2] or (a[2] == b[2] and a[3] < b[3]) end)
  end
  return found
end

local function pick()
  if pin ~= '' then
    local facts = facts_of(pin)
    if not facts[1] then return nil end
    local why, ip = refusal(pin, facts)
    if not why then return pin, facts, ip end
    return nil
  end
  local least, offset, size = memory * 65536 + vcpus, 0, #mix > 0 and 32 or 8
  while true do
    local page = order == 'spread'
      and redis.call('ZREVRANGEBYSCORE', KEYS[2], '+inf', least, 'WITHSCORES', 'LIMIT', offset, size)
      or redis.call('ZRANGEBYSCORE', KEYS[2], least, '+inf', 'WITHSCORES', 'LIMIT', offset, size)
    for _, c in ipairs(candidates(page)) do
      local facts = facts_of(c[1])
      local why, ip = refusal(c[1], facts)
      if not why then return c[1], facts, ip end
    end
    if #page < 2 * size then return nil end
    offset = offset + size
  end
end

local function explain(port_reason)
  local answer = {'no', port_reason}
  for _, node in ipairs(redis.call('SMEMBERS', KEYS[3])) do
    local facts = facts_of(node)
    answer[#answer + 1] = node
    answer[#answer + 1] = facts[1] - facts[3]
    answer[#answer + 1] = facts[2] - facts[4]
    answer[#answer + 1] = refusal(node, facts, port_reason == '' and 'ip' or 'fits') or 'fits'
  end
  return answer
end

local node, facts, ip = pick()
if not node then
  return explain('')
end
local port = 0
if ARGV[9] == '1' then
  local first, last = string.match(redis.call('HGET', KEYS[6], ARGV[2]) or '', '^(%d+)-(%d+)$')
  port = first and span_take(KEYS[5], tonumber(first), tonumber(last), vm, KEYS[4])
  if not port then
    span_cool(prefix .. 'ips:' .. node, vm, 0)
    return explain(first and 'port' or 'no range')
  end
end
if ARGV[11] ~= '' and not mac then
  mac = ARGV[11]
  redis.call('HSET', KEYS[7], vm, mac)
  redis.call('HSET', KEYS[8], mac, vm)
end
claims[#claims + 1] = {node = node, vcpus = vcpus, memory = memory, port = port, ip = ip, step = step}
claims_write(KEYS[4], vm, claims)
local used_vcpus, used_memory = facts[3] + vcpus, facts[4] + memory
redis.call('HSET', prefix .. 'node:' .. node, 'used_vcpus', used_vcpus, 'used_memory_mib', used_memory)
pool_rank(KEYS[2], node, facts[1] - used_vcpus, facts[2] - used_memory, true)
if tonumber(facts[6]) > 0 then
  redis.call('ZADD', prefix .. 'starts:' .. node, now_ms() + ARGV[14], vm)
end
return {'ok', node, port, string.format('%.0f', ip), mac}
