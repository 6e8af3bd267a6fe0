-- One random pixel a request.

local here = debug.getinfo(1, "S").source:match("^@(.*/)")
local common = dofile(here .. "common.lua")

init = common.seed
done = common.report

function request()
    return common.post("/pixel", common.pixel())
end
