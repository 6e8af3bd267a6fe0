-- A hundred random pixels a request.

local here = debug.getinfo(1, "S").source:match("^@(.*/)")
local common = dofile(here .. "common.lua")

init = common.seed
done = common.report

function request()
    local pixels = {}
    for i = 1, 100 do
        pixels[i] = common.pixel()
    end
    return common.post("/pixels", "[" .. table.concat(pixels, ",") .. "]")
end
