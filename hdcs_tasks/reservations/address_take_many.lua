-- needs: epoch_guard, span
-- Give VMs their console port, their MAC and an IP of one server node in one go, each VM all three or none:
-- address_take.lua for many, with a read and a write of each key for all of them together.
-- Returns {port, ip, mac, …} of each VM: {0, 0, why} where it got none, why: mac (propose another) | port | ip.
--
-- KEYS[1]  epoch:run_id
-- KEYS[2]  ports:<domain node>   see span.lua
-- KEYS[3]  ips:<server node>     see span.lua
-- KEYS[4]  mac:all               hash   see mac_take.lua
-- KEYS[5]  claims:<domain node>  hash   read: who holds a claim keeps its port
-- ARGV     vm, proposed MAC, …: at most 1,000 VMs, none of them twice
local vms, wanted = {}, {}
for i = 1, #ARGV, 2 do
  vms[#vms + 1] = ARGV[i]
  wanted[i], wanted[i + 1] = ARGV[i], ':' .. ARGV[i + 1]
end
local count = #vms
vms[count + 1], vms[count + 2], vms[count + 3] = ':next', ':first', ':last'
local macs = redis.call('HMGET', KEYS[4], unpack(wanted))
local new_macs, proposed, answer = {}, {}, {}

-- What the VMs own of a span, and what it still has. Nothing is written before close().
local function open(base, held)
  local own = redis.call('HMGET', base, unpack(vms))
  local first, last = tonumber(own[count + 2] or nil), tonumber(own[count + 3] or nil)
  local span = {own = own, free = {}, base = base, first = first, last = last, held = held,
                highest = tonumber(own[count + 1] or nil), sets = {}, back = {}, mine = {}}
  for i = 1, count do
    if own[i] then span.mine[vms[i]] = true end
  end
  return span
end

local function number_of(span, i)
  if span.own[i] then return tonumber(span.own[i]) end
  if not span.first then return nil end
  local spare = table.remove(span.free)
  if spare then return spare end
  if span.highest < span.last then
    span.highest = span.highest + 1
    return span.highest
  end
  return span_used_before(span.base, span.first, span.last, span.held, span.mine)
end

local function keep(span, i, number)
  if span.own[i] then
    span.back[#span.back + 1] = vms[i]
  else
    span.sets[#span.sets + 1] = vms[i]
    span.sets[#span.sets + 1] = number
  end
end

local function close(span)
  if #span.sets > 0 or #span.free > 0 then
    redis.call('HSET', span.base, ':next', span.highest, unpack(span.sets))
  end
  for _, number in ipairs(span.free) do redis.call('RPUSH', span.base .. ':free', number) end
  if #span.back > 0 then redis.call('ZREM', span.base .. ':cooling', unpack(span.back)) end
end

local ports, ips = open(KEYS[2], KEYS[5]), open(KEYS[3])
for i = 1, count do
  local at = 2 * i - 1
  local mac, new = macs[at], not macs[at]
  local port, ip, why
  if new then
    mac = ARGV[at + 1]
    if macs[at + 1] or proposed[mac] then why = 'mac' end
  end
  if not why then
    port = number_of(ports, i)
    ip = port and number_of(ips, i)
    if not port then
      why = 'port'
    elseif not ip then
      why = 'ip'
      if not ports.own[i] then ports.free[#ports.free + 1] = port end
    end
  end
  if why then
    port, ip, mac = 0, 0, why
  else
    keep(ports, i, port)
    keep(ips, i, ip)
    if new then
      proposed[mac] = true
      local n = #new_macs
      new_macs[n + 1], new_macs[n + 2], new_macs[n + 3], new_macs[n + 4] = vms[i], mac, ':' .. mac, vms[i]
    end
  end
  answer[3 * i - 2], answer[3 * i - 1], answer[3 * i] = port, ip, mac
end
close(ports)
close(ips)
if #new_macs > 0 then redis.call('HSET', KEYS[4], unpack(new_macs)) end
return answer
