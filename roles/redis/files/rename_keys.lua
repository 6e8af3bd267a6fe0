-- Moves the canvas from the names of keys that releases before 1.1 use to the present ones (app/src/pixel/names.py).
-- Redis executes a script as a whole. Each step can be repeated, and does nothing if there are no former names.
--
--   begin    refuse writes under the former names, unless there is maintenance already
--   copy     copy all keys: releases of both kinds then show the same canvas, and refuse writes
--   finish   copy what has changed since, delete the former names, and accept writes
--
-- Returns 'changed' or 'unchanged'.
local STATE = '{"state":"read-only","message":"The service is being updated; writes are possible again soon.","since":"%s"}'
local MARK = 'pixel:{0}:copied'

local function new_name(key)
  local column, row = string.match(key, '^pixel:{(%d+):(%d+)}$')
  if column then return 'pixel:{0}:tile:' .. column .. ':' .. row end
  local name = string.match(key, '^pixel:(.+)$')
  if name == 'events' or name == 'keys' or name == 'keys:version' or name == 'maintenance'
    or name == 'restrictions' or name == 'moderation' or name and string.match(name, '^budget:') then
    return 'pixel:{0}:' .. name
  end
end

-- What changes with every write, and with every change of a client's key.
local function version(prefix)
  local last = redis.call('XREVRANGE', prefix .. 'events', '+', '-', 'COUNT', 1)[1]
  return (last and last[1] or '-') .. ' ' .. (redis.call('GET', prefix .. 'keys:version') or '-')
end

local former, is_used = {}, false
for _, key in ipairs(redis.call('KEYS', 'pixel:*')) do
  if new_name(key) then
    former[key] = new_name(key)
    is_used = is_used or string.match(key, '^pixel:{%d+:%d+}$') or key == 'pixel:events' or key == 'pixel:keys'
  end
end
if not is_used then return 'unchanged' end

if ARGV[1] == 'begin' then
  if (redis.call('GET', 'pixel:maintenance') or '') == '' then
    redis.call('SET', 'pixel:maintenance', string.format(STATE, ARGV[2]))
  end
  return 'changed'
end

-- There is no mark before the first copy, even if the canvas has no events.
local mark = redis.call('GET', MARK)
if version('pixel:') ~= mark then
  if version('pixel:{0}:') ~= (mark or '- -') then
    return redis.error_reply('ERR the canvas was painted under the former and under the present names of its keys')
  end
  for key, name in pairs(former) do redis.call('COPY', key, name, 'REPLACE') end
  redis.call('SET', MARK, version('pixel:'))
elseif ARGV[1] == 'copy' then
  return 'unchanged'
end

if ARGV[1] == 'finish' then
  for key in pairs(former) do redis.call('DEL', key) end
  redis.call('DEL', MARK)
  local state = redis.call('GET', 'pixel:{0}:maintenance') or ''
  if string.find(state, string.match(STATE, '"message":"[^"]*"'), 1, true) then
    redis.call('SET', 'pixel:{0}:maintenance', '')
  end
end
return 'changed'
