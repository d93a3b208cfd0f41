// Captured runs of dlms_engine, for C++ programs; see the pages of each header.
#pragma once

#include "device_ring.h"
#include "driver.h"
#include "graph_cache.h"
#include "graph_run.h"
