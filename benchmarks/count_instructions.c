/* A plugin of QEMU's user-mode emulator (7.2 and later; no header of QEMU is needed to build it): how often each block of
 * translated instructions is executed. At the end it writes lines "address instructions executions" to the file that the argument
 * out names. Blocks that start at one address but have been translated again are lines of their own.
 *
 * Source of the interface: QEMU, include/qemu/qemu-plugin.h, version 1. */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef uint64_t Plugin;
typedef struct TranslatedBlock TranslatedBlock;
enum { ADD_U64 = 0 };
void qemu_plugin_register_vcpu_tb_trans_cb(Plugin, void (*)(Plugin, TranslatedBlock *));
void qemu_plugin_register_vcpu_tb_exec_inline(TranslatedBlock *, int operation, void *counter, uint64_t operand);
void qemu_plugin_register_atexit_cb(Plugin, void (*)(Plugin, void *), void *data);
size_t qemu_plugin_tb_n_insns(const TranslatedBlock *);
uint64_t qemu_plugin_tb_vaddr(const TranslatedBlock *);

__attribute__((visibility("default"))) int qemu_plugin_version = 1;

typedef struct Block {
    uint64_t address, instructions, executions;
    struct Block *next;
} Block;
static Block *blocks;
static const char *path;

static void translated(Plugin plugin, TranslatedBlock *translation) {
    Block *block = calloc(1, sizeof *block);
    if (block == NULL) abort();
    block->address = qemu_plugin_tb_vaddr(translation);
    block->instructions = qemu_plugin_tb_n_insns(translation);
    block->next = __atomic_load_n(&blocks, __ATOMIC_RELAXED);
    while (!__atomic_compare_exchange_n(&blocks, &block->next, block, 0, __ATOMIC_RELEASE, __ATOMIC_RELAXED)) {}
    qemu_plugin_register_vcpu_tb_exec_inline(translation, ADD_U64, &block->executions, 1);
}

static void ended(Plugin plugin, void *data) {
    FILE *file = fopen(path, "w");
    if (file == NULL) abort();
    for (Block *block = blocks; block != NULL; block = block->next)
        if (block->executions > 0)
            fprintf(file, "%" PRIu64 " %" PRIu64 " %" PRIu64 "\n", block->address, block->instructions, block->executions);
    fclose(file);
}

__attribute__((visibility("default"))) int qemu_plugin_install(Plugin plugin, const void *info, int count, char **arguments) {
    for (int i = 0; i < count; ++i)
        if (strncmp(arguments[i], "out=", 4) == 0) path = strdup(arguments[i] + 4);
    if (path == NULL) return -1;
    qemu_plugin_register_vcpu_tb_trans_cb(plugin, translated);
    qemu_plugin_register_atexit_cb(plugin, ended, NULL);
    return 0;
}
