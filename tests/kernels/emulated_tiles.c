/* AMX's tile registers in memory: what the instructions do, from Intel's Software Developer's Manual, for processors without them.
 * Shapes are checked as the instructions check them; a wrong one ends the process. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { TILES = 8, ROWS = 16, BYTES = 64 };

static _Thread_local struct {
    int is_configured, rows[TILES], bytes[TILES];
    uint8_t data[TILES][ROWS][BYTES];
} unit;

static void require(int holds, const char *what) {
    if (holds) return;
    fprintf(stderr, "emulated tiles: %s\n", what);
    abort();
}

void emulated_ldtilecfg(const uint8_t *memory) {
    require(memory[0] == 1, "palette 1 is the only one");
    for (int i = 1; i < 16; ++i) require(memory[i] == 0, "reserved bytes are not zero");
    memset(&unit, 0, sizeof unit);
    for (int tile = 0; tile < TILES; ++tile) {
        unit.bytes[tile] = memory[16 + 2 * tile] + 256 * memory[17 + 2 * tile];
        unit.rows[tile] = memory[48 + tile];
        require(unit.bytes[tile] <= BYTES && unit.rows[tile] <= ROWS, "tiles have 16 rows of 64 bytes at most");
    }
    unit.is_configured = 1;
}
void emulated_tilerelease(void) { memset(&unit, 0, sizeof unit); }
void emulated_tilezero(int8_t tile) {
    require(unit.is_configured, "tiles are not configured");
    memset(unit.data[tile], 0, sizeof unit.data[tile]);
}
void emulated_tileloadd64(int8_t tile, const uint8_t *memory, int64_t stride) {
    emulated_tilezero(tile);
    for (int row = 0; row < unit.rows[tile]; ++row)
        memcpy(unit.data[tile][row], memory + row * stride, (size_t)unit.bytes[tile]);
}
void emulated_tilestored64(int8_t tile, uint8_t *memory, int64_t stride) {
    require(unit.is_configured, "tiles are not configured");
    for (int row = 0; row < unit.rows[tile]; ++row)
        memcpy(memory + row * stride, unit.data[tile][row], (size_t)unit.bytes[tile]);
}
/* Unsigned bytes of the first source by signed bytes of the second. */
void emulated_tdpbusd(int8_t sums, int8_t first, int8_t second) {
    require(unit.is_configured && unit.rows[sums] == unit.rows[first] && unit.bytes[sums] == unit.bytes[second] &&
                unit.bytes[first] == 4 * unit.rows[second],
            "shapes of tiles do not fit each other");
    for (int m = 0; m < unit.rows[sums]; ++m)
        for (int k = 0; k < unit.rows[second]; ++k)
            for (int n = 0; n < unit.bytes[sums] / 4; ++n)
                for (int i = 0; i < 4; ++i) {
                    int32_t total;
                    memcpy(&total, &unit.data[sums][m][4 * n], 4);
                    total += unit.data[first][m][4 * k + i] * (int8_t)unit.data[second][k][4 * n + i];
                    memcpy(&unit.data[sums][m][4 * n], &total, 4);
                }
}
