-- needs: epoch_guard, span, claims
-- Pick the server node for a VM and claim vCPU, memory, console port, IP and MAC in one go: all or nothing.
-- Returns {'ok', node, port, ip, mac, and if asked: node, free vCPU, free MiB, score or '', why, …}; {'mac'}: propose another MAC; {'two', node, node}: the VM holds two claims;
-- {'amounts', node}: it holds a claim of another size; {'no', port reason or '', node, free vCPU, free MiB, why, …}.
--
-- KEYS[1]                          epoch:run_id; the others are told here, not passed: every argument costs
-- <prefix>pool:<domain node>       zset   server nodes with something free: score = free MiB * 65,536 + free vCPU
-- <prefix>nodes:<domain node>      set    all its server nodes (read to explain a refusal)
-- <prefix>claims:<domain node>     hash   see claims.lua
-- <prefix>ports:<domain node>      see span.lua
-- <prefix>mac:all                  hash   see mac_take.lua
-- <prefix>node:<server node>       hash   see pool_put.lua
-- <prefix>ips:<server node>        see span.lua
-- <prefix>starts:<server node>     zset   VM -> time (ms) from which its start no longer counts as under way
-- <prefix>starting:<domain node>   zset   the same for the whole pool, where it is limited
-- <prefix>limits:all               hash   domain node -> starts under way at once on its storage
-- <prefix>tagged:<domain node>     set    marks its VMs have
-- <prefix>tagged:<domain node>:<mark>  set  VMs with it; those without a claim are dropped as they are met
-- ARGV[1]   prefix
-- ARGV[2]   mix of VMs expected next "vcpus,memory_mib,weight;…" or ''
-- ARGV[3]   domain node|vm|step|vcpus|memory_mib|pin or ''|",excluded,"|port 0 or 1|ip 0 or 1|proposed MAC or ''|
--           pack or spread|",required,tags,"|start_ms (0: no start, counts against no limit)|so many of the server
--           nodes it weighed are told, best first (0: none)
-- ARGV[4]   only for a VM with tags, rules about others' or a server node it came from:
--           ",marks,"|",shuns,"|",seeks,"|the server node it goes to if that has room, or ''
local floor = math.floor
local prefix = ARGV[1]
local domain_node, vm, step, vcpus, memory, pin, excluded, want_port, want_ip, new_mac, order, tags, start_ms, told =
  string.match(ARGV[3], '^' .. string.rep('([^|]*)|', 13) .. '([^|]*)$')
vcpus, memory, start_ms, told = tonumber(vcpus), tonumber(memory), tonumber(start_ms), tonumber(told)
local pool_key, claims_key, ports_key = prefix .. 'pool:' .. domain_node, prefix .. 'claims:' .. domain_node,
  prefix .. 'ports:' .. domain_node

local function is_in(list, name)
  return string.find(list, ',' .. name .. ',', 1, true) ~= nil
end

-- What the VM holds already: the same request again, or a later step of a VM that was never seen to stop.
local claims = claims_read(redis.call('HGET', claims_key, vm))
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
    claims_write(claims_key, vm, claims)
  end
  redis.call('ZREM', ports_key .. ':cooling', vm)
  return {'ok', mine.node, mine.port, mine.ip, redis.call('HGET', prefix .. 'mac:all', vm) or ''}
end
if #claims > 1 then
  return {'two', claims[1].node, claims[2].node}
end

local mac = ''
if new_mac ~= '' then
  local taken
  mac, taken = unpack(redis.call('HMGET', prefix .. 'mac:all', vm, ':' .. new_mac))
  if not mac and taken then return {'mac'} end
end

-- The server nodes where another VM with this mark holds a claim, as a set; nil: none.
local function company(mark)
  local key, found = prefix .. 'tagged:' .. domain_node .. ':' .. mark, nil
  for _, other in ipairs(redis.call('SMEMBERS', key)) do
    if other ~= vm then
      local held = claims_read(redis.call('HGET', claims_key, other))
      if #held == 0 then redis.call('SREM', key, other) end
      for _, c in ipairs(held) do
        found = found or {}
        found[c.node] = true
      end
    end
  end
  return found
end

local marks, preferred, shunned, sought = '', '', {}, {}
if ARGV[4] then
  local shuns, seeks
  marks, shuns, seeks, preferred = string.match(ARGV[4], '^([^|]*)|([^|]*)|([^|]*)|([^|]*)$')
  for mark in string.gmatch(shuns, '[^,]+') do shunned[#shunned + 1] = {mark, company(mark) or {}} end
  for mark in string.gmatch(seeks, '[^,]+') do
    local there = company(mark)
    if there then sought[#sought + 1] = {mark, there} end
  end
end

-- Why the node cannot take the VM, in one word; nil: it can, and an IP of it is now the VM's (second value).
local function refusal(node, facts, dry)
  if pin ~= '' and node ~= pin then return 'unpinned' end
  if is_in(excluded, node) then return 'excluded' end
  if facts[5] ~= '1' then return 'draining' end
  for tag in string.gmatch(tags, '[^,]+') do
    if not is_in(facts[7], tag) then return 'tag ' .. tag end
  end
  for _, s in ipairs(shunned) do
    if s[2][node] then return 'apart ' .. s[1] end
  end
  for _, s in ipairs(sought) do
    if not s[2][node] then return 'together ' .. s[1] end
  end
  if facts[2] - facts[4] < memory then return 'memory' end
  if facts[1] - facts[3] < vcpus then return 'vcpus' end
  if start_ms > 0 and tonumber(facts[6]) > 0 then
    local starts = prefix .. 'starts:' .. node
    redis.call('ZREMRANGEBYSCORE', starts, '-inf', now_ms())
    if redis.call('ZCARD', starts) >= tonumber(facts[6]) then return 'starts' end
  end
  if want_ip == '1' then
    if facts[8] == '' then return 'no subnet' end
    if dry then return dry end
    local ip = span_take(prefix .. 'ips:' .. node, vm)
    if not ip then return 'ip' end
    return nil, ip
  end
  return nil, 0
end

local function facts_of(node)
  return redis.call('HMGET', prefix .. 'node:' .. node, 'vcpus', 'memory_mib', 'used_vcpus', 'used_memory_mib',
    'schedulable', 'max_starts', 'tags', 'subnet')
end

local mix = {}
for v, m, w in string.gmatch(ARGV[2], '(%d+),(%d+),([%d.]+)') do
  mix[#mix + 1] = {tonumber(v), tonumber(m), tonumber(w), 0.1}
end

-- How many nodes to look at before the best is taken, and what a whole VM less of each profile weighs (fourth value).
-- A pool is full for whom finds no room first, and that is mostly the largest: its last places go one by one to smaller
-- VMs that fitted elsewhere. So while few nodes still take the largest every node is looked at, up to `careful`, and a
-- place weighs the more, the fewer nodes have one for that profile (by memory: what a count in the pool's order can
-- tell). While many take it there is nothing to be careful about. To spread is to look at the emptiest alone while more
-- than three quarters of the nodes still take the largest. The same in Python, of a snapshot: pool/weighing.py.
local careful = 20
local function look_at()
  local largest, few
  local by_order = math.max(2, told)  -- the order alone decides; one more, should the first be full of CPU
  if #mix == 0 then return by_order end
  for i = 1, #mix do
    if not largest or mix[i][2] > largest[2] then largest = mix[i] end
  end
  few = redis.call('ZCOUNT', pool_key, largest[2] * 65536 + largest[1], '+inf')
  if order == 'spread' and 4 * few > 3 * redis.call('ZCARD', pool_key) then
    mix = {}
    return by_order
  end
  if few > careful then return 5 end
  for i = 1, #mix do
    local p = mix[i]
    local nodes = p == largest and few or redis.call('ZCOUNT', pool_key, p[2] * 65536 + p[1], '+inf')
    p[4] = 300 / math.max(1, nodes) ^ 3
  end
  return careful
end

-- Future VMs (weighted by the mix) that no longer fit on a node once this VM is on it. Counted in fractions, so that it
-- shows on an empty node too what wastes the scarcer resource, and in whole VMs, which decides near the end.
local function lost(free_vcpus, free_memory)
  local sum, vcpus_after, memory_after = 0, free_vcpus - vcpus, free_memory - memory
  for i = 1, #mix do
    local p = mix[i]
    local v, m = p[1], p[2]
    local before, after = free_vcpus / v, vcpus_after / v
    local before_m, after_m = free_memory / m, memory_after / m
    if before_m < before then before = before_m end
    if after_m < after then after = after_m end
    sum = sum + (before - after + p[4] * (floor(before) - floor(after))) * p[3]
  end
  return sum
end

-- The nodes of one page that have room: names in the page's order, and what each would lose.
local function candidates(page)
  local names, losses = {}, {}
  for i = 1, #page, 2 do
    local score = tonumber(page[i + 1])
    local free_memory = floor(score / 65536)
    local free_vcpus = score - free_memory * 65536
    if free_vcpus >= vcpus and free_memory >= memory then
      names[#names + 1] = page[i]
      losses[#names] = #mix > 0 and lost(free_vcpus, free_memory) or 0
    end
  end
  return names, losses
end

-- Take the best of them out: the least loss, the earlier among equals. Nil: none left.
local function best_of(names, losses)
  local best
  for i = 1, #names do
    if names[i] and (not best or losses[i] < losses[best]) then
      best = i
      if #mix == 0 then break end
    end
  end
  local name = best and names[best]
  if best then names[best] = false end
  return name, best
end

local weighed = {}
local function tell(name, free_vcpus, free_memory, loss, why)
  if #weighed < 5 * told then
    local score = #mix > 0 and string.format('%.17g', loss) or ''
    for _, value in ipairs({name, free_vcpus, free_memory, score, why or ''}) do weighed[#weighed + 1] = value end
  end
end

-- Who of a page would have been next.
local function tell_rest(names, losses)
  local name, at = best_of(names, losses)
  while name and #weighed < 5 * told do
    local facts = facts_of(name)
    local why = refusal(name, facts, 'fits')
    tell(name, facts[1] - facts[3], facts[2] - facts[4], losses[at], why ~= 'fits' and why or '')
    name, at = best_of(names, losses)
  end
end

-- The node of this name, if it has room.
local function named(node)
  local facts = facts_of(node)
  if not facts[1] then return nil end
  local why, ip = refusal(node, facts)
  if why then return nil end
  mix = {}
  tell(node, facts[1] - facts[3], facts[2] - facts[4])
  return node, facts, ip
end

local function pick()
  if pin ~= '' then return named(pin) end
  if preferred ~= '' and redis.call('SISMEMBER', prefix .. 'nodes:' .. domain_node, preferred) == 1 then
    local node, facts, ip = named(preferred)
    if node then return node, facts, ip end
  end
  local least, offset, size = memory * 65536 + vcpus, 0, look_at()
  while true do
    local page = order == 'spread'
      and redis.call('ZREVRANGEBYSCORE', pool_key, '+inf', least, 'WITHSCORES', 'LIMIT', offset, size)
      or redis.call('ZRANGEBYSCORE', pool_key, least, '+inf', 'WITHSCORES', 'LIMIT', offset, size)
    local names, losses = candidates(page)
    local name, at = best_of(names, losses)
    while name do
      local facts = facts_of(name)
      local why, ip = refusal(name, facts)
      if told > 0 then tell(name, facts[1] - facts[3], facts[2] - facts[4], losses[at], why) end
      if not why then
        if told > 0 then tell_rest(names, losses) end
        return name, facts, ip
      end
      name, at = best_of(names, losses)
    end
    if #page < 2 * size then return nil end
    offset, size = offset + size, math.max(size, 8)
  end
end

local function explain(port_reason)
  local answer = {'no', port_reason}
  for _, node in ipairs(redis.call('SMEMBERS', prefix .. 'nodes:' .. domain_node)) do
    local facts = facts_of(node)
    answer[#answer + 1] = node
    answer[#answer + 1] = facts[1] - facts[3]
    answer[#answer + 1] = facts[2] - facts[4]
    answer[#answer + 1] = refusal(node, facts, port_reason == '' and 'ip' or 'fits') or 'fits'
  end
  return answer
end

local pool_starts = start_ms > 0 and tonumber(redis.call('HGET', prefix .. 'limits:all', domain_node) or 0) or 0
local starting_key = prefix .. 'starting:' .. domain_node
if pool_starts > 0 then
  redis.call('ZREMRANGEBYSCORE', starting_key, '-inf', now_ms())
  if redis.call('ZCARD', starting_key) >= pool_starts then return explain('starts') end
end
local node, facts, ip = pick()
if not node then
  return explain('')
end
local port = 0
if want_port == '1' then
  port = span_take(ports_key, vm, claims_key)
  if not port then
    span_cool(prefix .. 'ips:' .. node, vm, 0)
    return explain(redis.call('HEXISTS', ports_key, ':first') == 1 and 'port' or 'no range')
  end
end
if new_mac ~= '' and not mac then
  mac = new_mac
  redis.call('HSET', prefix .. 'mac:all', vm, mac, ':' .. mac, vm)
end
claims[#claims + 1] = {node = node, vcpus = vcpus, memory = memory, port = port, ip = ip, step = step}
claims_write(claims_key, vm, claims)
local used_vcpus, used_memory = facts[3] + vcpus, facts[4] + memory
redis.call('HSET', prefix .. 'node:' .. node, 'used_vcpus', used_vcpus, 'used_memory_mib', used_memory)
pool_rank(pool_key, node, facts[1] - used_vcpus, facts[2] - used_memory, true)
if start_ms > 0 and tonumber(facts[6]) > 0 then
  redis.call('ZADD', prefix .. 'starts:' .. node, now_ms() + start_ms, vm)
end
if pool_starts > 0 then
  redis.call('ZADD', starting_key, now_ms() + start_ms, vm)
end
for mark in string.gmatch(marks, '[^,]+') do
  redis.call('SADD', prefix .. 'tagged:' .. domain_node, mark)
  redis.call('SADD', prefix .. 'tagged:' .. domain_node .. ':' .. mark, vm)
end
return {'ok', node, port, ip, mac, unpack(weighed)}
