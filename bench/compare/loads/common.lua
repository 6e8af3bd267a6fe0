-- Common to the scripts: random pixels, raw requests, and the result as JSON.

local common = {}

local random = math.random
local token = os.getenv("BENCH_TOKEN") or ""
local key = token ~= "" and "Authorization: Bearer " .. token .. "\r\n" or ""
local CHANNELS = { "R", "G", "B" }

function common.seed()
    math.randomseed(os.time() + (tonumber(tostring({}):match("0x(%x+)"), 16) or 0) % 100000)
end

function common.pixel()
    return '{"x":' .. random(0, 1023) .. ',"y":' .. random(0, 1023)
        .. ',"channel":"' .. CHANNELS[random(3)] .. '","value":' .. random(0, 255) .. "}"
end

function common.post(path, body, headers)
    return "POST " .. path .. " HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n" .. key
        .. (headers or "") .. "Content-Length: " .. #body .. "\r\n\r\n" .. body
end

function common.get_pixel()
    return "GET /pixel/" .. random(0, 1023) .. "/" .. random(0, 1023)
        .. " HTTP/1.1\r\nHost: bench\r\n\r\n"
end

-- Latencies are in microseconds.
function common.report(summary, latency)
    local errors = summary.errors
    io.write(string.format(
        '{"requests":%d,"seconds":%.6f,"p50_ms":%.4f,"p99_ms":%.4f,"socket_errors":%d,"bad_statuses":%d}\n',
        summary.requests, summary.duration / 1e6,
        latency:percentile(50) / 1000, latency:percentile(99) / 1000,
        errors.connect + errors.read + errors.write + errors.timeout, errors.status
    ))
end

return common
