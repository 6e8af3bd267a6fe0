-- Redis's protocol over Nginx's cosockets: pipelined commands on keep-alive connections.

local resp = {}

local IDLE_MS = 60000
local POOL = 512

function resp.command(...)
    local parts = { "*", select("#", ...), "\r\n" }
    for i = 1, select("#", ...) do
        local argument = tostring((select(i, ...)))
        parts[#parts + 1] = "$" .. #argument .. "\r\n" .. argument .. "\r\n"
    end
    return table.concat(parts)
end

local function read_reply(socket)
    local line, problem = socket:receive()
    if not line then
        return nil, problem
    end
    local kind, rest = line:sub(1, 1), line:sub(2)
    if kind == "-" then
        return nil, rest
    elseif kind == "+" then
        return rest
    elseif kind == ":" then
        return tonumber(rest)
    elseif kind == "$" then
        local size = tonumber(rest)
        if size < 0 then
            return false
        end
        local data, failure = socket:receive(size + 2)
        if not data then
            return nil, failure
        end
        return data:sub(1, size)
    end
    local list = {}
    for i = 1, tonumber(rest) do
        local item, failure = read_reply(socket)
        if item == nil then
            return nil, failure
        end
        list[i] = item
    end
    return list
end

-- Sends encoded commands, and returns the replies, or nil and the reason.
function resp.exchange(host, port, commands, count)
    local socket = ngx.socket.tcp()
    socket:settimeout(5000)
    local connected, problem = socket:connect(host, port, { pool_size = POOL })
    if not connected then
        return nil, problem
    end
    local sent, failure = socket:send(commands)
    if not sent then
        return nil, failure
    end
    local replies = {}
    for i = 1, count do
        local reply, reason = read_reply(socket)
        if reply == nil then
            socket:close()
            return nil, reason
        end
        replies[i] = reply
    end
    socket:setkeepalive(IDLE_MS, POOL)
    return replies
end

return resp
