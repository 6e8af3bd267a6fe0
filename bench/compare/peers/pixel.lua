-- The pixel endpoint in Lua: validates, stores, appends the event, then answers.
-- Lua has one type of number, so 255.0 is accepted as 255; all other checks are those of the app.

local cjson = require("cjson.safe")
local resp = require("resp")

local pixel = {}

local WIDTH, HEIGHT, TILE = 1024, 1024, 256
local CHANNELS = { R = 0, G = 1, B = 2 }
local FIELDS = 4

local host, port, with_events

function pixel.configure(redis_host, redis_port, events)
    host, port, with_events = redis_host, redis_port, events
end

local function refuse(status, title)
    ngx.status = status
    ngx.header["Content-Type"] = "application/problem+json"
    ngx.print('{"type":"about:blank","title":"', title, '","status":', status, "}")
end

local function is_integer(value, limit)
    return type(value) == "number" and value >= 0 and value < limit and value % 1 == 0
end

local function is_pixel(value)
    if type(value) ~= "table" then
        return false
    end
    local fields = 0
    for _ in pairs(value) do
        fields = fields + 1
    end
    return fields == FIELDS
        and is_integer(value.x, WIDTH)
        and is_integer(value.y, HEIGHT)
        and is_integer(value.value, 256)
        and type(value.channel) == "string"
        and CHANNELS[value.channel] ~= nil
end

local function place(x, y)
    local tile_x, tile_y = math.floor(x / TILE), math.floor(y / TILE)
    return "pixel:{0}:tile:" .. tile_x .. ":" .. tile_y, ((y % TILE) * TILE + x % TILE) * 3
end

function pixel.write()
    if ngx.req.get_method() ~= "POST" then
        return refuse(405, "Method Not Allowed")
    end
    local kind = ngx.var.content_type
    if not kind or not kind:find("^application/json") then
        return refuse(415, "Unsupported Media Type")
    end
    ngx.req.read_body()
    local wanted = cjson.decode(ngx.req.get_body_data() or "")
    if wanted == nil then
        return refuse(400, "Bad Request")
    end
    if not is_pixel(wanted) then
        return refuse(422, "Unprocessable Content")
    end

    local x, y, channel, value = wanted.x, wanted.y, wanted.channel, wanted.value
    local key, offset = place(x, y)
    local commands = resp.command("BITFIELD", key, "SET", "u8", "#" .. offset + CHANNELS[channel], value)
    local count = 1
    if with_events then
        local event = x .. " " .. y .. " " .. channel .. " " .. value
        commands = commands
            .. resp.command("XADD", "pixel:{0}:events", "MAXLEN", "~", 20000, "*", "c", event)
        count = 2
    end
    if not resp.exchange(host, port, commands, count) then
        return refuse(503, "Service Unavailable")
    end
    ngx.print(
        '{"status":"ok","received":{"x":', x, ',"y":', y,
        ',"channel":"', channel, '","value":', value, "}}"
    )
end

function pixel.read()
    local x, y = ngx.var.uri:match("^/pixel/(%d+)/(%d+)$")
    x, y = tonumber(x), tonumber(y)
    if not x or x >= WIDTH or y >= HEIGHT then
        return refuse(404, "Not Found")
    end
    local key, offset = place(x, y)
    local replies = resp.exchange(host, port, resp.command("GETRANGE", key, offset, offset + 2), 1)
    if not replies then
        return refuse(503, "Service Unavailable")
    end
    local red, green, blue = replies[1]:byte(1, 3)
    ngx.print(
        '{"x":', x, ',"y":', y, ',"R":', red or 0, ',"G":', green or 0, ',"B":', blue or 0, "}"
    )
end

return pixel
