/* Replicas that cost next to nothing: streams of chunks on a fixed beat, on two ports of one process.

   usage: mock PORT PORT FIRST_MS GAP_MS CHUNKS KIND
   KIND is what /v1/models says owns the model. Chunks carry token ids if the request asks for them.
   One thread; once a millisecond it looks at every stream. */

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define MOST 65536
#define INPUT 16384

typedef struct { int live, left, ids; int64_t due; size_t have; char *in; } Stream;

static Stream streams[MOST];
static int highest;

static int64_t now_us(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000 + t.tv_nsec / 1000;
}

static int listen_on(int port) {
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), on = 1;
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons(port)};
    at.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (bind(fd, (struct sockaddr *)&at, sizeof at) || listen(fd, 8192)) {
        perror("mock");
        exit(1);
    }
    return fd;
}

static void drop(int fd) {
    streams[fd].live = streams[fd].left = 0;
    streams[fd].have = 0;
    close(fd);
}

static void say(int fd, const char *text, int size) {
    if (send(fd, text, size, MSG_NOSIGNAL | MSG_DONTWAIT) != size) drop(fd);
}

static void answer(int fd, const char *head, size_t size, int64_t first, int chunks,
                   const char *kind) {
    char out[512], body[256];
    Stream *s = &streams[fd];
    if (!strncmp(head, "GET ", 4) || memmem(head, size, "X-Millrace-Probe", 16)) {
        int n = snprintf(body, sizeof body,
                         "{\"status\":\"ok\",\"data\":[{\"id\":\"mock\",\"object\":\"model\","
                         "\"owned_by\":\"%s\"}]}", kind);
        if (!strncmp(head, "GET /load", 9)) n = snprintf(body, sizeof body, "{\"requests\":0}");
        n = snprintf(out, sizeof out,
                     "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
                     "Content-Length: %d\r\n\r\n%s", n, body);
        say(fd, out, n);
        return;
    }
    const char *head_out = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
                           "Cache-Control: no-cache\r\nTransfer-Encoding: chunked\r\n\r\n";
    s->ids = memmem(head, size, "\"return_token_ids\":true", 23) != NULL;
    s->left = chunks;
    s->due = now_us() + first;
    say(fd, head_out, (int)strlen(head_out));
}

static void take(int fd, int64_t first, int chunks, const char *kind) {
    Stream *s = &streams[fd];
    for (;;) {
        ssize_t n = recv(fd, s->in + s->have, INPUT - 1 - s->have, MSG_DONTWAIT);
        if (n == 0 || (n < 0 && errno != EAGAIN)) { drop(fd); return; }
        if (n < 0) break;
        s->have += (size_t)n;
        s->in[s->have] = 0;
    }
    char *end = strstr(s->in, "\r\n\r\n");
    if (!end) return;
    char *length = strcasestr(s->in, "content-length:");
    size_t whole = (size_t)(end + 4 - s->in) + (length && length < end ? (size_t)atol(length + 15) : 0);
    if (s->have < whole) return;
    answer(fd, s->in, whole, first, chunks, kind);
    s->have = 0;
}

static void beat(int64_t gap) {
    static const char plain[] =
        "data: {\"id\":\"cmpl-0123456789abcdef0123456789abcdef\",\"object\":\"text_completion\","
        "\"created\":1795000000,\"model\":\"mock\",\"choices\":[{\"index\":0,\"text\":\" token\","
        "\"logprobs\":null,\"finish_reason\":null,\"stop_reason\":null";
    char chunk[512], text[512];
    int64_t now = now_us();
    for (int fd = 0; fd <= highest; fd++) {
        Stream *s = &streams[fd];
        if (!s->live || !s->left || s->due > now) continue;
        int n = snprintf(text, sizeof text, "%s%s}]}\n\n", plain, s->ids ? ",\"token_ids\":[12345]" : "");
        n = snprintf(chunk, sizeof chunk, "%x\r\n%s\r\n", n, text);
        if (!--s->left) n += sprintf(chunk + n, "e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n");
        s->due += gap;
        say(fd, chunk, n);
    }
}

int main(int argc, char **argv) {
    if (argc != 7) return 2;
    int64_t first = atol(argv[3]) * 1000, gap = atol(argv[4]) * 1000;
    int chunks = atoi(argv[5]), poll = epoll_create1(0), on = 1;
    struct rlimit many = {MOST, MOST};
    setrlimit(RLIMIT_NOFILE, &many);
    int doors[2] = {listen_on(atoi(argv[1])), listen_on(atoi(argv[2]))};
    for (int i = 0; i < 2; i++) {
        struct epoll_event e = {.events = EPOLLIN, .data.fd = doors[i]};
        epoll_ctl(poll, EPOLL_CTL_ADD, doors[i], &e);
    }
    struct epoll_event ready[256];
    for (int64_t next = now_us();;) {
        int wait = (int)((next - now_us()) / 1000);
        int n = epoll_wait(poll, ready, 256, wait > 0 ? wait : 0);
        for (int i = 0; i < n; i++) {
            int fd = ready[i].data.fd;
            if (fd != doors[0] && fd != doors[1]) {
                take(fd, first, chunks, argv[6]);
                continue;
            }
            int other;
            while ((other = accept4(fd, NULL, NULL, SOCK_NONBLOCK)) >= 0) {
                Stream *s = &streams[other];
                if (!s->in) s->in = malloc(INPUT);
                s->live = 1; s->left = 0; s->have = 0;
                if (other > highest) highest = other;
                setsockopt(other, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
                struct epoll_event e = {.events = EPOLLIN, .data.fd = other};
                epoll_ctl(poll, EPOLL_CTL_ADD, other, &e);
            }
        }
        if (now_us() >= next) { beat(gap); next = now_us() + 1000; }
    }
}
