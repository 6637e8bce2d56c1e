-- Library: numbers out of a span [first, last], each owned by one VM, cooling after use. Ports and IPs both.
--
-- <base>           hash   VM -> number, owned or cooling
-- <base>:cooling   zset   VM -> time (ms) from which its number may go to another VM
-- <base>:free      list   numbers used before and free again, longest-free first
-- <base>:next      string the highest number ever given out by the cursor
local function now_ms()
  local t = redis.call('TIME')
  return t[1] * 1000 + math.floor(t[2] / 1000)
end

-- The VM's own number (taken back if it was cooling), else one never used, else a free one, else a ripe one; or nil.
-- `held`: a hash whose VMs keep their number although it is cooling (they hold a claim again), or nil.
local function span_take(base, first, last, vm, held)
  local own = redis.call('HGET', base, vm)
  if own then
    redis.call('ZREM', base .. ':cooling', vm)
    return tonumber(own)
  end
  local number = redis.call('INCR', base .. ':next')
  if number < first then
    number = first
    redis.call('SET', base .. ':next', first)
  end
  if number > last then
    redis.call('SET', base .. ':next', last)
    repeat
      number = tonumber(redis.call('LPOP', base .. ':free') or nil)
    until not number or (number >= first and number <= last)
  end
  if not number then
    local ripe = redis.call('ZRANGEBYSCORE', base .. ':cooling', '-inf', now_ms(), 'LIMIT', 0, 8)
    for _, old in ipairs(ripe) do
      if not held or redis.call('HEXISTS', held, old) == 0 then
        local candidate = tonumber(redis.call('HGET', base, old) or nil)
        redis.call('ZREM', base .. ':cooling', old)
        redis.call('HDEL', base, old)
        if candidate and candidate >= first and candidate <= last then
          number = candidate
          break
        end
      end
    end
  end
  if number then
    redis.call('HSET', base, vm, number)
  end
  return number
end

-- The VM's number may go to another VM after cooling_ms. False where the VM has none.
local function span_cool(base, vm, cooling_ms)
  if redis.call('HEXISTS', base, vm) == 0 then
    return false
  end
  redis.call('ZADD', base .. ':cooling', 'NX', now_ms() + cooling_ms, vm)
  return true
end

-- Move up to `most` ripe numbers to the free list; returns how many.
local function span_reclaim(base, first, last, most)
  local ripe = redis.call('ZRANGEBYSCORE', base .. ':cooling', '-inf', now_ms(), 'LIMIT', 0, most)
  for _, vm in ipairs(ripe) do
    local number = tonumber(redis.call('HGET', base, vm) or nil)
    redis.call('ZREM', base .. ':cooling', vm)
    redis.call('HDEL', base, vm)
    if number and number >= first and number <= last then
      redis.call('RPUSH', base .. ':free', number)
    end
  end
  return #ripe
end
