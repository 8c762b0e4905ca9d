/* A link with a delay, jitter, loss, reordering and a rate, between two devices of one namespace.
 *
 *     impair DEVICE DEVICE DELAY_MS JITTER_MS LOSS_PERCENT REORDER_PERCENT RATE_MBIT BUFFER_MS
 *
 * Prints "up" when it forwards, and forwards until it is killed. Each direction has a queue of its own. A frame is
 * lost at random; or it waits for the rate (0: none) behind those before it, is dropped where that takes longer than
 * the buffer, and arrives after the delay and up to the jitter more or less, each frame for itself: frames
 * overtake each other by as much, and a reordered one has no delay at all. As tc-netem(8), which not every kernel has.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <linux/if_ether.h>
#include <linux/if_packet.h>
#include <net/if.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>

#define WAITING 262144 /* frames, both ways together: a quarter of a second at 12 Gbit/s */
#define FRAME 9216     /* bytes; larger ones would be superpackets, which no link carries */
#define BATCH 64       /* frames read from one device before those that are due leave */
#define RECEIVE_BUFFER (64 << 20)

struct frame {
    uint64_t due_ns, number;
    int to, length;
    unsigned char *bytes;
};

static struct frame *heap[WAITING], *spare[WAITING];
static int waiting, spares;
static uint64_t random_state;

static uint64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

/* xorshift64 (Marsaglia 2003): 0 up to 1 */
static double dice(void) {
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return (random_state >> 11) / 9007199254740992.0;
}

static int before(const struct frame *a, const struct frame *b) {
    return a->due_ns < b->due_ns || (a->due_ns == b->due_ns && a->number < b->number);
}

static void push(struct frame *frame) {
    int place = waiting++;
    for (; place && before(frame, heap[(place - 1) / 2]); place = (place - 1) / 2)
        heap[place] = heap[(place - 1) / 2];
    heap[place] = frame;
}

static struct frame *pop(void) {
    struct frame *first = heap[0], *last = heap[--waiting];
    int place = 0;
    for (int child; (child = 2 * place + 1) < waiting; place = child) {
        if (child + 1 < waiting && before(heap[child + 1], heap[child]))
            child++;
        if (!before(heap[child], last))
            break;
        heap[place] = heap[child];
    }
    heap[place] = last;
    return first;
}

static struct frame *fresh(void) {
    if (spares)
        return spare[--spares];
    struct frame *frame = malloc(sizeof *frame);
    if (!frame || !(frame->bytes = malloc(FRAME))) {
        fputs("impair: no memory\n", stderr);
        exit(1);
    }
    return frame;
}

static int open_device(const char *name) {
    int size = RECEIVE_BUFFER, yes = 1;
    int fd = socket(AF_PACKET, SOCK_RAW, htons(ETH_P_ALL));
    struct sockaddr_ll address = {
        .sll_family = AF_PACKET, .sll_protocol = htons(ETH_P_ALL), .sll_ifindex = if_nametoindex(name)};
    setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, &size, sizeof size);
    setsockopt(fd, SOL_PACKET, PACKET_IGNORE_OUTGOING, &yes, sizeof yes);
    if (fd < 0 || !address.sll_ifindex || bind(fd, (struct sockaddr *)&address, sizeof address)) {
        perror(name);
        exit(1);
    }
    return fd;
}

int main(int count, char **words) {
    if (count != 9) {
        fputs("usage: impair DEVICE DEVICE DELAY_MS JITTER_MS LOSS_PERCENT REORDER_PERCENT RATE_MBIT BUFFER_MS\n", stderr);
        return 2;
    }
    int fds[2] = {open_device(words[1]), open_device(words[2])};
    double delay_ns = atof(words[3]) * 1e6, jitter_ns = atof(words[4]) * 1e6;
    double loss = atof(words[5]) / 100, reorder = atof(words[6]) / 100;
    double ns_per_byte = atof(words[7]) > 0 ? 8000 / atof(words[7]) : 0;
    uint64_t buffer_ns = atof(words[8]) * 1e6, free_ns[2] = {0, 0}, number = 0;
    random_state = now_ns() | 1;
    puts("up");
    fflush(stdout);
    for (;;) {
        uint64_t now = now_ns();
        while (waiting && heap[0]->due_ns <= now) {
            struct frame *frame = pop();
            send(fds[frame->to], frame->bytes, frame->length, MSG_DONTWAIT);
            spare[spares++] = frame;
        }
        struct pollfd ready[2] = {{fds[0], POLLIN, 0}, {fds[1], POLLIN, 0}};
        struct timespec due = {0, 0};
        if (waiting) {
            uint64_t wait_ns = heap[0]->due_ns > now ? heap[0]->due_ns - now : 0;
            due.tv_sec = wait_ns / 1000000000;
            due.tv_nsec = wait_ns % 1000000000;
        }
        if (ppoll(ready, 2, waiting ? &due : NULL, NULL) <= 0)
            continue;
        for (int from = 0; from < 2; from++)
            for (int left = ready[from].revents ? BATCH : 0; left; left--) {
                struct frame *frame = fresh();
                /* MSG_TRUNC: the whole length, so that what is too long is known */
                frame->length = recv(fds[from], frame->bytes, FRAME, MSG_DONTWAIT | MSG_TRUNC);
                uint64_t begin = now_ns();
                int full = waiting == WAITING - 1 || (free_ns[from] > begin && free_ns[from] - begin > buffer_ns);
                if (frame->length <= 0 || frame->length > FRAME || full || dice() < loss) {
                    int ended = frame->length <= 0;
                    spare[spares++] = frame;
                    if (ended)
                        break;
                    continue;
                }
                if (free_ns[from] < begin)
                    free_ns[from] = begin;
                free_ns[from] += frame->length * ns_per_byte;
                double late_ns = delay_ns + (dice() * 2 - 1) * jitter_ns;
                frame->due_ns = free_ns[from] + (late_ns > 0 && dice() >= reorder ? (uint64_t)late_ns : 0);
                frame->number = number++;
                frame->to = 1 - from;
                push(frame);
            }
    }
}
