/* A guest without an operating system, for VMMs whose KVM cannot run Linux, and for tests that need
 * no image. Entered by PVH: 32 bits, no paging. It counts; each number is written to memory, to a
 * page of its own, and to the serial port as a line of eight hexadecimal digits. */
    .section .note.pvh, "a", @note
    .long 4, 8, 18              /* XEN_ELFNOTE_PHYS32_ENTRY */
    .asciz "Xen"
    .quad start

    .text
    .code32
    .globl start
start:
    incl count
    movl count, %esi
    movl %esi, %edi
    andl $0xff, %edi            /* 256 pages take turns */
    shll $12, %edi
    movl %esi, 0x1000000(%edi)
    movw $0x3f8, %dx
    movl $8, %ecx
digit:
    roll $4, %esi
    movl %esi, %eax
    andl $0xf, %eax
    movb digits(%eax), %al
    outb %al, %dx
    loop digit
    movb $'\n', %al
    outb %al, %dx
    movl $20000, %ecx
wait:
    loop wait
    jmp start
digits:
    .ascii "0123456789abcdef"

    .data
    .balign 4096
    .globl count
count:
    .long 0

    .section .note.GNU-stack, "", @progbits
