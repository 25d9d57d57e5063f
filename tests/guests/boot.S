# The first sector of the bare guest's disk: loads what follows it to 0x10000, goes to 32-bit protected mode with flat
# segments and jumps there.
.code16
.globl _start
_start:
	cli
	cld
	xor %ax, %ax
	mov %ax, %ds
	mov %ax, %es
	mov %ax, %ss
	mov $0x7c00, %sp
	mov $packet, %si
	mov $0x42, %ah			# extended read of the boot drive, whose number is in dl
	int $0x13
	jc failed
	lgdt descriptors
	mov %cr0, %eax
	or $1, %eax
	mov %eax, %cr0
	ljmp $8, $protected
failed:
	mov $'!', %al
	out %al, $0xe9
	hlt
	jmp failed

.code32
protected:
	mov $16, %ax
	mov %ax, %ds
	mov %ax, %es
	mov %ax, %ss
	mov $0x7c00, %esp
	ljmp $8, $0x10000

.align 8
packet:
	.byte 16, 0
	.word 64			# sectors: 32 KiB
	.word 0, 0x1000			# to 0x1000:0
	.quad 1				# from the second sector on
table:
	.quad 0
	.quad 0x00cf9a000000ffff	# code
	.quad 0x00cf92000000ffff	# data
descriptors:
	.word descriptors - table - 1
	.long table
.org 510
.word 0xaa55
